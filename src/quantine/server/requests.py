"""Requests for completions of texts and of conversations, as they arrive."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Final

from quantine.errors import shown
from quantine.runtime.sampling import COLDEST, SEEDS, Sampling
from quantine.server.fields import Fields
from quantine.server.refusal import Refusal

ROLES: Final = ("system", "developer", "user", "assistant")
"""Roles of messages; templates know no developers, whom OpenAI's newer models call system."""
TEXT_TOKENS: Final = 16
"""Tokens that continue a text at most, where the request does not say and there is room."""
HOTTEST: Final = 2.0
"""Largest temperature."""


@dataclass(frozen=True)
class Conversation:
    """Messages that an answer continues.

    Attributes:
        messages: each with ``role`` and ``content``.
    """

    messages: list[dict[str, str]]


@dataclass(frozen=True)
class Request:
    """What a client asks for.

    Attributes:
        prompt: what is continued: a text, its token ids, or a conversation.
        most: tokens of the answer at most; ``None`` if the client does not say.
        sampling: how tokens are chosen.
        stops: strings that end the answer, which does not have them.
        stream: whether the answer is sent in pieces.
        usage: whether the last piece says how many tokens there were.
    """

    prompt: str | list[int] | Conversation
    most: int | None
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    usage: bool


def read_request(body: Any, chat: bool, model: str, context: int) -> Request:
    """The request in ``body``.

    Args:
        body: what a JSON text holds.
        chat: whether it must be a conversation.
        model: the only model there is.
        context: tokens of prompt and answer at most.

    Raises:
        Refusal: there is something in it that is wrong, or that nobody here understands.
    """
    fields = Fields(body)
    _check_model(fields, model)
    stream = fields.switch("stream")
    request = Request(
        Conversation(_messages(fields)) if chat else _text(fields),
        _most(fields, chat, context),
        _sampling(fields),
        fields.stops(),
        stream,
        _usage(fields, stream),
    )
    fields.finish()
    return request


def _check_model(fields: Fields, model: str) -> None:
    name = fields.take("model", lambda value: isinstance(value, str), "a string")
    if name is None:
        raise Refusal(f"model is missing: give {model!r}", "model")
    check_served(name, model)


def check_served(name: str, model: str) -> None:
    """Refuse the ``name`` of a model that is not ``model``, the only one there is.

    Raises:
        Refusal: it is another one.
    """
    if name != model:
        raise Refusal(
            f"there is no model {shown(name)} here, only {model!r}", "model", "model_not_found", 404
        )


def _text(fields: Fields) -> str | list[int]:
    wanted = "one text, or its token ids"
    prompt: Any = fields.take("prompt", lambda value: isinstance(value, str | list), wanted)
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # a list of prompts
    if not isinstance(prompt, str) and not _is_ids(prompt):
        raise Refusal(f"prompt must be {wanted}, not {shown(prompt)}", "prompt")
    if not prompt:
        raise Refusal("prompt is empty: there is nothing to continue", "prompt")
    found: str | list[int] = prompt
    return found


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(type(token) is int for token in prompt)


def _messages(fields: Fields) -> list[dict[str, str]]:
    wanted = "a list of messages, at least one"
    messages = fields.take(
        "messages", lambda value: isinstance(value, list) and value != [], wanted
    )
    if messages is None:
        raise Refusal(f"messages is missing: it must be {wanted}", "messages")
    return [_message(f"messages[{place}]", message) for place, message in enumerate(messages)]


def _message(place: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise Refusal(f"{place} must have one of the roles {', '.join(ROLES)}", place)
    # Clients send answers back as they got them.
    given = {key for key, value in message.items() if value not in (None, [], "")}
    unknown = sorted(given - {"role", "content"})
    if unknown:
        raise Refusal(f"{place} has {shown(unknown[0])}, which is not known here", place)
    role = "system" if message["role"] == "developer" else message["role"]
    return {"role": role, "content": _content(place, message.get("content"))}


def _content(place: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    parts: list[Any] = content if isinstance(content, list) and content else [None]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise Refusal(f"{place} must have content that is text", place)
        if not isinstance(part.get("text"), str):
            raise Refusal(f"{place} has a part without text", place)
    return "".join(part["text"] for part in parts)


def _most(fields: Fields, chat: bool, context: int) -> int | None:
    names = ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",)
    given = [count for name in names if (count := fields.count(name, 1, context)) is not None]
    return min(given, default=None)


def _sampling(fields: Fields) -> Sampling:
    """As OpenAI's servers do it: a request that does not say it samples at temperature 1."""
    temperature = fields.number("temperature", 0, HOTTEST, 1)
    top_p = fields.number("top_p", 0, 1, 1)
    seed = fields.count("seed", 0, SEEDS - 1)
    greedy = temperature < COLDEST or top_p == 0
    return Sampling(
        0.0 if greedy else temperature,
        1.0 if greedy else top_p,
        secrets.randbelow(SEEDS) if seed is None else seed,
    )


def _usage(fields: Fields, stream: bool) -> bool:
    def is_right(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and value.keys() <= {"include_usage"}
            and all(isinstance(flag, bool) for flag in value.values())
        )

    options = fields.take("stream_options", is_right, "an object with include_usage alone")
    if options is not None and not stream:
        raise Refusal("stream_options is for answers in pieces: add stream", "stream_options")
    return bool(options and options.get("include_usage"))
