"""The layout of packed matrices on GPUs: codes in units, statistics beside them.

A unit is 32 consecutive stored columns of a row. Its codes of ``bits`` bits fill exactly ``bits``
words of 32 bits. Codes ``p`` and ``16 + p`` are pair ``p``: they lie at the same place of the low
and of the high half of one word, so that one instruction takes both out. Words of the same number
stand side by side, unit after unit, so that a thread reads four units at once in 16 bytes.
docs/gpu.md has the reasons.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

UNIT: Final = 32
"""Codes of a unit."""
PAIRS: Final = UNIT // 2
"""Pairs of a unit, which is also the number of codes in half of it."""
HALF_BITS: Final = 16
"""Bits of half a word."""
TOGETHER: Final = 4
"""Units that a thread reads at once; their number in a row is filled up to a multiple of it."""


class Piece(NamedTuple):
    """A run of bits of a code that lie together in a word.

    Attributes:
        word: number of the word in the unit.
        offset: lowest bit of the run in each half of the word.
        first: lowest bit of the run in the code.
        width: number of bits.
    """

    word: int
    offset: int
    first: int
    width: int


def pieces(bits: int) -> list[list[Piece]]:
    """Where the codes of each pair of a unit are.

    Each half of a word holds as many whole codes as fit, from bit 0 on. The bits that are left over
    above them, word after word, make up the codes of the last pairs, lowest bits first.

    Args:
        bits: number of bits of one code, 2 to 8.

    Returns:
        For each of the `PAIRS` pairs its pieces, lowest bits first.
    """
    whole = HALF_BITS // bits
    left = [(word, bit) for word in range(bits) for bit in range(whole * bits, HALF_BITS)]
    found = [[Piece(p // whole, p % whole * bits, 0, bits)] for p in range(whole * bits)]
    for start in range(0, len(left), bits):
        pair: list[Piece] = []
        for first, (word, bit) in enumerate(left[start : start + bits]):
            if pair and pair[-1].word == word:
                pair[-1] = pair[-1]._replace(width=pair[-1].width + 1)
            else:
                pair.append(Piece(word, bit, first, 1))
        found.append(pair)
    return found


def pack_units(codes: Tensor, bits: int) -> Tensor:
    """Codes in units.

    Args:
        codes: ``[rows, columns]`` uint8, columns in stored order.
        bits: number of bits of one code, 2 to 8.

    Returns:
        ``[rows, bits, units]`` int32, filled up with codes of zero to a multiple of `TOGETHER`.
    """
    units = units_of(codes.shape[1])
    filled = codes.new_zeros(len(codes), units * UNIT)
    filled[:, : codes.shape[1]] = codes
    low, high = filled.view(len(codes), units, 2, PAIRS).int().unbind(2)
    words = torch.zeros(len(codes), bits, units, dtype=torch.int32, device=codes.device)
    for pair, places in enumerate(pieces(bits)):
        for place in places:
            mask = (1 << place.width) - 1
            both = (low[..., pair] >> place.first) & mask
            both = both | ((high[..., pair] >> place.first) & mask) << HALF_BITS
            words[:, place.word] |= both << place.offset
    return words


def unpack_units(words: Tensor, bits: int, columns: int) -> Tensor:
    """Invert `pack_units`: ``[rows, columns]`` uint8."""
    rows, _, units = words.shape
    codes = torch.zeros(rows, units, 2, PAIRS, dtype=torch.int32, device=words.device)
    for pair, places in enumerate(pieces(bits)):
        for place in places:
            mask = (1 << place.width) - 1
            for half in (0, 1):
                found = (words[:, place.word] >> (place.offset + HALF_BITS * half)) & mask
                codes[:, :, half, pair] |= found << place.first
    return codes.view(rows, units * UNIT)[:, :columns].to(torch.uint8)


def units_of(columns: int) -> int:
    """Number of units in a row of ``columns`` codes, those included that fill it up."""
    return -(-columns // (UNIT * TOGETHER)) * TOGETHER
