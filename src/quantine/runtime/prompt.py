"""Texts and conversations as the token ids that a model continues, and its tokens as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from quantine.calibrate.conversations import in_template
from quantine.calibrate.token_stream import token_stream
from quantine.errors import PlanError

UNFINISHED: Final = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer gives for a character of which tokens are missing."""
CONTEXT: Final = 8
"""Number of tokens before new ones that are decoded with them, at least."""
LONGEST: Final = 64
"""Number of tokens that are decoded for each new one, at most, while characters are whole."""


def text_ids(tokenizer: Any, text: str, vocabulary: int) -> Tensor:
    """Token ids ``[1, n]`` int64 of a text, begun but not ended as the tokenizer does it.

    Args:
        tokenizer: of transformers.
        text: what is to be continued.
        vocabulary: number of tokens that the model knows.

    Raises:
        CalibrationError: the tokenizer cannot read the text, or belongs to another model.
        PlanError: there is nothing to continue.
    """
    stream = token_stream(tokenizer, text, vocabulary, "PROMPT")
    return _ids(torch.cat([stream.begin, stream.tokens]))


def conversation_ids(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], vocabulary: int
) -> Tensor:
    """Token ids ``[1, n]`` int64 of a conversation in the chat template, for its next message.

    Args:
        tokenizer: of transformers.
        messages: each with ``role`` and ``content``.
        vocabulary: number of tokens that the model knows.

    Raises:
        CalibrationError: the tokenizer cannot read it, or belongs to another model; or the template
            refuses the messages.
        PlanError: there is no chat template, or nothing to continue.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise PlanError("the tokenizer has no chat template: leave out --chat")
    text = in_template(tokenizer, messages, answer=True)
    # A chat template brings its own beginning.
    return _ids(token_stream(tokenizer, text, vocabulary, "PROMPT").tokens)


def _ids(tokens: Tensor) -> Tensor:
    if tokens.numel() == 0:
        raise PlanError("the prompt is empty: nothing to continue")
    return tokens.unsqueeze(0)


class Transcript:
    """The text of tokens that arrive one after another, in whole characters.

    It is what they add to the text before them: many tokenizers take the first space off a text.
    Tokens that stand for no text, such as those that end a message, are left out.

    Args:
        tokenizer: of transformers.
        before: the tokens before them; the last few matter.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._added = 0
        self._look_back(before)

    def add(self, token: int) -> str:
        """What ``token`` adds to the text: nothing until a character has all of its tokens."""
        self._tokens.append(token)
        self._added += 1
        text = self._text()
        if text.endswith(UNFINISHED):
            return ""
        new = self._new(text)
        if len(self._tokens) > LONGEST:
            self._look_back(self._tokens)
        return new

    def rest(self) -> str:
        """What is left once no more tokens come, such as a character that lacks some."""
        return self._new(self._text())

    def _look_back(self, before: Sequence[int]) -> None:
        """Begin with the last few of ``before``, whose text is known."""
        count = min(CONTEXT, len(before))
        self._tokens = list(before[len(before) - count :])
        # Bytes of a character are text only together, in some tokenizers all those in a row are.
        while count < len(before) and self._text().startswith(UNFINISHED):
            count = min(2 * count, len(before))
            self._tokens = list(before[len(before) - count :])
        self._shown = self._text()

    def _new(self, text: str) -> str:
        known = len(self._shown)
        if not text.startswith(self._shown):  # its last character was not finished, and now is
            known = len(self._shown.rstrip(UNFINISHED))
        self._shown = text
        return text[known:]

    def _text(self) -> str:
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return text

    def __len__(self) -> int:
        return self._added
