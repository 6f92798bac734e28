"""Conversations as text: what a model made for chats sees of them, by its tokenizer's template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantine.calibrate.token_stream import frame_of
from quantine.errors import CalibrationError, cut


def conversation_text(messages: list[Any], tokenizer: Any, where: str) -> str:
    """Write a conversation by the tokenizer's chat template.

    Tokens that the tokenizer itself puts before a text are left out where the template begins with
    them, too: they are put before the whole text.

    Args:
        messages: a dictionary for each message, with strings ``role`` and ``content``.
        tokenizer: the model's tokenizer of transformers, or ``None``.
        where: the place of the conversation, for messages.

    Raises:
        CalibrationError: it is no conversation, the tokenizer has no chat template, or the template
            refuses it.
    """
    if not messages or not all(_is_message(message) for message in messages):
        raise CalibrationError(
            f"{where} holds a list that is no conversation: each message needs the strings `role` "
            "and `content`"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{where} is a conversation, but the tokenizer has no chat template to write it with: "
            "give plain texts, or a model made for chats"
        )
    try:
        text = in_template(tokenizer, messages, answer=False)
    except CalibrationError as error:  # which may quote a text that is nobody's business
        raise CalibrationError(
            f"{where}: the tokenizer's chat template refuses the conversation: change its roles or "
            "their order, or leave it out"
        ) from error
    before = frame_of(tokenizer).before
    return text.removeprefix(tokenizer.decode(before)) if before else text


def in_template(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, answer: bool) -> str:
    """The text of a conversation in the chat template that a tokenizer has.

    Args:
        tokenizer: of transformers.
        messages: each with ``role`` and ``content``.
        answer: whether the text ends where the answer of a model begins.

    Raises:
        CalibrationError: the template refuses the conversation.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer
        )
    except MemoryError:
        raise
    except Exception as error:  # templates are programs, which fail in many ways
        raise CalibrationError(f"the chat template refuses the messages: {cut(error)}") from error
    return text


def _is_message(value: Any) -> bool:
    fields = ("role", "content")
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in fields)
