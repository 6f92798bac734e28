"""The words of ``dense_weights``: 16 weights and their part of the statistics in 64 bits each."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.core.finite import is_finite
from quantine.core.grid import Grid, Statistic
from quantine.errors import FormatError
from quantine.kernels.bits import pack, unpack

BITS: Final = 3
"""Bits of a code, of weights as of statistics."""
TILE: Final = 16
"""Rows and columns of a tile, which has one second-level grid for scales and one for zeros."""
FIELDS: Final = 21
"""Numbers of 3 bits in a word: scale code, zero code, 16 weights, and 9 bits of which the first 8
are a byte of the second level."""
WORD_BYTES: Final = 8
"""Bytes of a word, which is an int64."""
SECOND_LEVEL: Final = 54
"""From this bit on a word has a byte of the second level, and then bits that are zero."""


def pack_words(codes: Tensor, scale: Statistic, zero: Statistic) -> Tensor:
    """The words of a matrix, flat int64: one for each row of each tile of 16 by 16.

    Args:
        codes: of weights, ``[out, in]`` uint8.
        scale, zero: statistics of groups of 16 inputs, in tiles of 16 outputs.

    Returns:
        ``[out * in / 16]``, in the order ``[row tiles, column tiles, rows of a tile]``.
    """
    fields = scale.codes.new_empty(*_tiled(scale.codes).shape, FIELDS)
    fields[..., 0], fields[..., 1] = _tiled(scale.codes), _tiled(zero.codes)
    fields[..., 2:18] = codes.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).transpose(1, 2)
    second = [scale.grid.scale, zero.grid.scale, scale.grid.zero_point, zero.grid.zero_point]
    halves = torch.stack([half for half in second if isinstance(half, Tensor)], -1)
    octets = halves.transpose(0, 1).contiguous().view(torch.uint8).repeat_interleave(2, -1)
    for place in range(3):
        fields[..., 18 + place] = (octets >> BITS * place) & 7
    words: Tensor = pack(fields.flatten(0, 2), BITS)
    return words.view(torch.int64).view(-1)


def _tiled(codes: Tensor) -> Tensor:
    """Codes ``[groups, out]`` of a statistic as ``[row tiles, column tiles, 16]``."""
    return torch.unflatten(codes, 1, (-1, TILE)).transpose(0, 1)


def check_words(words: Tensor) -> None:
    """Refuse ``words`` that `pack_words` does not make.

    Raises:
        FormatError: says what is wrong with them.
    """
    # The last byte but two bits of each word, and one more bit of the byte before.
    octets = (words >> SECOND_LEVEL).view(-1, 2)
    pairs = (octets[:, 0] == octets[:, 1]) & (octets[:, 0] >> 8 == 0)
    halves = octets[:, 0].to(torch.uint8).view(torch.float16)
    if not bool(pairs.all()) or not is_finite(halves):
        raise FormatError(
            "dense_weights is damaged: unused bits are set, the two copies of the second level "
            "differ, or it is not finite"
        )


def unpack_words(words: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Grid]:
    """Invert `pack_words`: codes ``[out, in]`` uint8 and their grid.

    Raises:
        FormatError: the words are none that `pack_words` makes.
    """
    check_words(words)
    octets = words.contiguous().view(torch.uint8).view(-1, WORD_BYTES)
    fields = unpack(octets, BITS, FIELDS)
    fields = fields.view(out_features // TILE, in_features // TILE, TILE, FIELDS)
    twice = fields[..., 18] | fields[..., 19] << BITS | (fields[..., 20] & 3) << 2 * BITS
    twice = twice.unflatten(-1, (-1, 2))
    halves = twice[..., 0].contiguous().view(torch.float16).transpose(0, 1)

    def statistic(index: int) -> Statistic:
        step, zero = halves[..., index].contiguous(), halves[..., index + 2].contiguous()
        codes = fields[..., index].transpose(0, 1).flatten(1)
        return Statistic(codes, Grid(step, zero, BITS, TILE))

    codes = fields[..., 2:18].transpose(1, 2).reshape(out_features, in_features)
    return codes, Grid(statistic(0), statistic(1), BITS, TILE)
