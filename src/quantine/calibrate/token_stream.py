"""A text as a stream of tokens, and pieces of it that begin as the tokenizer begins a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from quantine.calibrate.bos import BOS_DEFAULT, Bos, check_bos
from quantine.errors import CalibrationError, ending

PROBE: Final = "a1\u03b1\u0431\u05d0\u0628\u0905\u0e01\u3042\u4e2d\uac00"
"""The text that shows what a tokenizer puts around every text: letters of many scripts, so that
every tokenizer knows one."""


@dataclass(frozen=True)
class Frame:
    """The token ids that a tokenizer puts around every text.

    Attributes:
        before: those in front of it, such as BOS.
        after: those behind it, such as EOS.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class TokenStream:
    """The tokens of a text, to be cut into pieces.

    Attributes:
        begin: ``[b]`` int64, the tokens that every piece begins with; they are not part of the
            text.
        tokens: ``[n]`` int64, the tokens of the text.
    """

    begin: Tensor
    tokens: Tensor

    def text_length(self, length: int) -> int:
        """Number of tokens of the text in a piece of ``length`` tokens; not positive if none."""
        return length - len(self.begin)

    def pieces(self, starts: Sequence[int], length: int) -> Tensor:
        """Pieces of ``length`` tokens whose texts begin at ``starts``.

        Returns:
            ``[len(starts), length]`` int64.
        """
        count = self.text_length(length)
        texts = [self.tokens[start : start + count] for start in starts]
        return torch.stack([torch.cat([self.begin, text]) for text in texts])


def check_characters(text: str, where: str) -> str:
    """Return ``text``, all of whose characters can be written as UTF-8.

    Args:
        text: the text.
        where: where it comes from, for the message.

    Raises:
        CalibrationError: there is half of a surrogate pair in it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where} holds half of a surrogate pair (U+{ord(text[error.start]):04X}), which is no "
            "character: write the whole pair, or leave it out"
        ) from None
    return text


def token_stream(
    tokenizer: Any, text: str, vocabulary: int, source: str, bos: Bos = BOS_DEFAULT
) -> TokenStream:
    """Tokenize a whole text into one stream of token ids.

    Args:
        tokenizer: the model's tokenizer of transformers.
        text: the text.
        vocabulary: number of tokens that the model knows.
        source: name of the text, for messages.
        bos: with ``"each"``, what the tokenizer puts before a text begins every piece, and what it
            puts behind is left out; with ``"first"``, both are tokens of the text, at its ends.

    Raises:
        CalibrationError: the tokenizer fails on the text, or an id lies outside the model's
            vocabulary.
    """
    check_bos(bos)
    check_characters(text, f"the text {ending(source)!r}")
    try:
        ids = _ids(tokenizer, text)
        frame = frame_of(tokenizer)
    except (CalibrationError, MemoryError):
        raise
    except Exception as error:  # tokenizer backends raise bare exceptions of their own
        raise CalibrationError(
            f"the tokenizer fails on the text {ending(source)!r} ({type(error).__name__}): try "
            "another text, and compare the tokenizer's files with those of the model's source"
        ) from error
    stream = torch.tensor(ids, dtype=torch.int64, device="cpu")
    if stream.numel() and not 0 <= int(stream.min()) <= int(stream.max()) < vocabulary:
        outside = next(number for number in ids if not 0 <= number < vocabulary)
        raise CalibrationError(
            f"the tokenizer gives id {outside} for text {ending(source)!r}, but the model knows "
            f"{vocabulary} tokens: tokenizer and model do not belong together"
        )
    before, after = len(frame.before), len(frame.after)
    if bos == "first":
        return TokenStream(stream[:0], stream)
    return TokenStream(stream[:before], stream[before : len(stream) - after])


def begun(tokenizer: Any, bos: Bos) -> str:
    """How pieces begin: ``bos``, or ``"none"`` if ``tokenizer`` puts nothing before a text.

    Raises:
        CalibrationError: as of `frame_of`.
    """
    check_bos(bos)
    return bos if frame_of(tokenizer).before else "none"


def frame_of(tokenizer: Any) -> Frame:
    """What ``tokenizer`` puts around every text, as it does it.

    Args:
        tokenizer: a tokenizer of transformers.

    Raises:
        CalibrationError: it cannot be told from the text, because a text has other tokens inside
            when something is put around it, or none at all.
    """
    inner, whole = _ids(tokenizer, PROBE, plain=True), _ids(tokenizer, PROBE)
    for start in range(len(whole) - len(inner) + 1):
        end = start + len(inner)
        if whole[start:end] == inner and (inner or not whole):
            return Frame(tuple(whole[:start]), tuple(whole[end:]))
    raise CalibrationError(
        "the tokenizer does not show what it puts around a text, so that segments cannot begin "
        "alike: use the tokenizer that belongs to the model"
    )


def _ids(tokenizer: Any, text: str, plain: bool = False) -> list[int]:
    """The token ids of ``text``, without what is put around every text if ``plain``."""
    options = {"add_special_tokens": False} if plain else {}
    return list(tokenizer(text, verbose=False, **options)["input_ids"])
