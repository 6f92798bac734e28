"""The layout of codes for integer products on GPUs: units that never cross a group.

Each group of inputs begins a new unit of 32 places. A unit's codes of ``bits`` bits fill exactly
``bits`` words of 32 bits. Four neighbouring codes are a quad: they lie at the same place of the
four bytes of one word, so that one instruction takes all four out, as bytes. A byte holds as many
whole codes as fit, from bit 0 on; the bits that are left over above them, word after word, make up
the codes of the last quads. Words of the same number stand side by side, unit after unit.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.kernels.matrix.units.layout import TOGETHER, UNIT, Piece

LANES: Final = 4
"""Codes of a quad, one in each byte of a word."""
QUADS: Final = UNIT // LANES
"""Quads of a unit."""
BYTE: Final = 8
"""Bits of a byte."""


def pieces(bits: int) -> list[list[Piece]]:
    """Where the codes of each quad of a unit are, in every byte of its words.

    Args:
        bits: number of bits of one code, 2 to 8.

    Returns:
        For each of the `QUADS` quads its pieces, lowest bits first; at most one in a word.
    """
    whole = BYTE // bits
    spare = BYTE - whole * bits
    found = [[Piece(q // whole, q % whole * bits, 0, bits)] for q in range(whole * bits)]
    for quad in range(QUADS - len(found)):
        first, last = quad * bits, (quad + 1) * bits  # among the bits left over
        parts = []
        for word in range(first // spare, -(-last // spare)):
            low, high = max(first, word * spare), min(last, (word + 1) * spare)
            parts.append(Piece(word, whole * bits + low - word * spare, low - first, high - low))
        found.append(parts)
    return found


def pack_quads(codes: Tensor, bits: int) -> Tensor:
    """Codes in units.

    Args:
        codes: ``[rows, 32 * units]`` uint8, those included that fill up groups.
        bits: number of bits of one code, 2 to 8.

    Returns:
        ``[rows, bits, units]`` int32.
    """
    quads = codes.view(len(codes), -1, QUADS, LANES).int()
    lanes = quads.new_zeros(len(codes), bits, quads.shape[1], LANES)
    for quad, places in enumerate(pieces(bits)):
        for place in places:
            part = (quads[:, :, quad] >> place.first) & ((1 << place.width) - 1)
            lanes[:, place.word] |= part << place.offset
    return lanes.to(torch.uint8).view(torch.int32).squeeze(3)


def unpack_quads(words: Tensor, bits: int) -> Tensor:
    """Invert `pack_quads`: ``[rows, 32 * units]`` uint8."""
    rows, _, units = words.shape
    lanes = words.unsqueeze(3).view(torch.uint8).int()
    quads = lanes.new_zeros(rows, units, QUADS, LANES)
    for quad, places in enumerate(pieces(bits)):
        for place in places:
            part = (lanes[:, place.word] >> place.offset) & ((1 << place.width) - 1)
            quads[:, :, quad] |= part << place.first
    return quads.view(rows, units * UNIT).to(torch.uint8)


def places_of(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The places of a row whose groups are of ``lengths``, as tensors on ``device``.

    Returns:
        The stored column at each place, ``[32 * units]`` int64, -1 where there is none; and the
        group of each unit, ``[units]`` int64. The number of units is filled up to a multiple of
        `TOGETHER`, with units of the last group.
    """
    units = [-(-length // UNIT) for length in lengths]
    units[-1] += -sum(units) % TOGETHER
    columns: list[int] = []
    start = 0
    for length, count in zip(lengths, units, strict=True):
        columns += [*range(start, start + length), *[-1] * (count * UNIT - length)]
        start += length
    groups = [group for group, count in enumerate(units) for _ in range(count)]
    return (
        torch.tensor(columns, dtype=torch.int64, device=device),
        torch.tensor(groups, dtype=torch.int64, device=device),
    )


def units_in_common(lengths: tuple[int, ...]) -> int:
    """How many neighbouring units, 1, 2 or 4, always are of one group."""
    units = [-(-length // UNIT) for length in lengths[:-1]]
    return next(n for n in (TOGETHER, 2, 1) if all(count % n == 0 for count in units))
