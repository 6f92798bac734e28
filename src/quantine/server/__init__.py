"""A server for one model, which speaks the protocol of OpenAI's API.

`fields` says which fields a request may have, `requests` makes a request of them, `answers` gives
results the form that clients expect, `engine` continues prompts, and `app` lets one client after
another have its turn. The web framework is imported by `app` and `serve` alone.
"""
