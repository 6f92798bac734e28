"""Answers in the form that OpenAI's clients expect, whole or in pieces."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any, Literal, NamedTuple

Finish = Literal["stop", "length"]
"""Why an answer ends: the model or a stop string ended it, or it has as many tokens as it may."""

DONE = "data: [DONE]\n\n"
"""What follows the last piece."""


class Piece(NamedTuple):
    """A further part of an answer.

    Attributes:
        text: may be empty.
        tokens: of the answer so far, without the one that ends it.
        finish: why the answer ends here; ``None`` if it goes on.
    """

    text: str
    tokens: int
    finish: Finish | None


def event(value: dict[str, Any]) -> str:
    """``value`` as an event that the server sends."""
    return f"data: {json.dumps(value)}\n\n"


class Answer:
    """The frame of one answer.

    Args:
        model: its name.
        chat: whether it is a message of a conversation.
        prompt_tokens: number of tokens in the prompt.
    """

    def __init__(self, model: str, chat: bool, prompt_tokens: int) -> None:
        self._chat = chat
        self._prompt_tokens = prompt_tokens
        self._frame = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        """The answer ``text``, of which ``last`` was the last piece."""
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {
            **self._frame,
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": [self._choice(said, last.finish)],
            "usage": self._usage(last.tokens),
        }

    def opening(self) -> str:
        """What comes before all pieces: who speaks, in a conversation."""
        return self._event({"role": "assistant", "content": ""}, None) if self._chat else ""

    def piece(self, piece: Piece) -> str:
        """A piece of the answer; nothing if there is nothing in it."""
        if not piece.text and piece.finish is None:
            return ""
        said = {"content": piece.text} if piece.text or not self._chat else {}
        return self._event(said, piece.finish)

    def count(self, tokens: int) -> str:
        """A last piece that says how many ``tokens`` the answer has."""
        return self._chunk([], {"usage": self._usage(tokens)})

    def _event(self, said: dict[str, str], finish: Finish | None) -> str:
        delta: dict[str, Any] = {"delta": said} if self._chat else {"text": said["content"]}
        return self._chunk([self._choice(delta, finish)], {})

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> str:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return event({**self._frame, "object": kind, "choices": choices, **more})

    def _choice(self, said: dict[str, Any], finish: Finish | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish}

    def _usage(self, tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self._prompt_tokens + tokens,
        }
