"""How programs for GPUs walk through the bit stream of a token: in pieces of whole words."""

from __future__ import annotations

from typing import Final, NamedTuple

WORD: Final = 32
"""Bits of a word."""


class Pieces(NamedTuple):
    """The shortest run of codes that fills whole words.

    Attributes:
        words: number of words of a piece.
        codes: number of codes of a piece.
    """

    words: int
    codes: int


def pieces_of(bits: int) -> Pieces:
    """Pieces of codes of ``bits`` bits, 2 to 8: 8 codes of 4 bits are a word, 32 of 3 are three."""
    shared = bits & -bits  # the largest power of two that divides both
    return Pieces(bits // shared, WORD // shared)


def width_of(dim: int) -> int:
    """Channels that programs compute with: a power of two, and whole pieces of any bits."""
    return max(WORD, 1 << (dim - 1).bit_length())
