"""Scales and zero points of a packed matrix as GPUs read them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.kernels.matrix.units.layout import HALF_BITS, PAIRS, UNIT, units_of

SPANS: Final = (128, 64, 32, 16)
"""Numbers of inputs that share statistics in this layout; those of longer groups are repeated."""
FARTHEST_ZERO: Final = 511.0
"""Largest distance of a zero point of groups along outputs from the middle code: 16 products with
activations, which are below 8, are summed in float16."""


@dataclass(frozen=True)
class RowGroups:
    """Scales and zero points of groups along inputs.

    Attributes:
        words: ``[planes, rows, groups]`` uint8, int16 or int32, all that a row stores of a group:
            its scale in the lowest ``scale_bits``, above it its zero point. The first of two planes
            has the groups of the first halves of units, the second those of the others.
        span: number of stored columns of a group, one of `SPANS`.
        scale_bits: bits of a scale: 16 for a float16, else those of a code of ``scale_grids``.
        zero_bits: bits of a zero point: 16 for a float16, 0 where it is ``2**(bits - 1)``
            everywhere, else those of a whole number, or of a code of ``zero_grids``.
        scale_grids, zero_grids: second grids, ``[tiles, planes, groups]`` int32: the bits of the
            step below those of the zero point, both float16. ``None`` where there are none.
        tile: number of rows that share a second grid; all rows where there are none.
        factors: ``[rows]`` float32, a power of two for each row; its scales divided by it are at
            most 1.
    """

    words: Tensor
    span: int
    scale_bits: int
    zero_bits: int
    scale_grids: Tensor | None
    zero_grids: Tensor | None
    tile: int
    factors: Tensor

    @property
    def planes(self) -> int:
        """Number of groups in a unit, 1 if they are as long as a unit or longer."""
        return len(self.words)

    def of_rows(self, rows: Tensor) -> RowGroups:
        """Those of ``rows`` ``[n]`` int64, which share no second grids."""
        grids = [
            None if each is None else each[rows // self.tile]
            for each in (self.scale_grids, self.zero_grids)
        ]
        return replace(
            self,
            words=self.words.index_select(1, rows),
            factors=self.factors[rows],
            scale_grids=grids[0],
            zero_grids=grids[1],
            tile=1,
        )


@dataclass(frozen=True)
class ColumnGroups:
    """Scales and zero points of groups along outputs, decoded, and rounded to float16.

    Attributes:
        scales: ``[groups, 16, units]`` int32, placed as activations are, see
            `quantine.kernels.matrix.units.activations.Arranged`; divided by their factor.
        zeros: placed likewise, less ``2**(bits - 1)``; ``None`` where that is zero everywhere.
        size: number of rows of a group.
        factors: ``[groups]`` float32, a power of two for each group of rows; its scales divided by
            it are at most 1.
    """

    scales: Tensor
    zeros: Tensor | None
    size: int
    factors: Tensor

    def of_rows(self, rows: Tensor) -> ColumnGroups:
        """Those of ``rows`` ``[n]`` int64, each a group of its own."""
        groups = rows // self.size
        zeros = None if self.zeros is None else self.zeros[groups]
        return ColumnGroups(self.scales[groups], zeros, 1, self.factors[groups])


def row_groups(qtensor: QTensor) -> RowGroups | None:
    """The statistics of ``qtensor``, whose groups run along inputs.

    ``None`` if groups are neither multiples of 16 inputs nor all of them.
    """
    grid, (rows, columns) = qtensor.grid, qtensor.codes.shape
    span = next((span for span in SPANS if grid.group_size % span == 0), None)
    if grid.group_size >= columns:
        span = SPANS[0]
    if span is None:
        return None
    word, scale_bits, scale_grids = _field(grid.scale, grid.bits)
    zero_bits, zero_grids = 0, None
    if grid.zero_point is not None:
        zero, zero_bits, zero_grids = _field(grid.zero_point, grid.bits)
        word = word | zero << scale_bits
    width = scale_bits + zero_bits
    dtype = torch.uint8 if width <= 8 else torch.int16 if width <= 16 else torch.int32

    def placed(groups: Tensor) -> Tensor:
        runs = torch.arange(-(-columns // span), device=groups.device) * span
        return _by_plane(groups[:, runs // min(grid.group_size, columns)], columns, span)

    return RowGroups(
        placed(word).to(dtype).contiguous(),
        span,
        scale_bits,
        zero_bits,
        None if scale_grids is None else placed(scale_grids).transpose(0, 1).contiguous(),
        None if zero_grids is None else placed(zero_grids).transpose(0, 1).contiguous(),
        _tile(grid, rows),
        _factors(grid.scales()),
    )


def column_groups(qtensor: QTensor) -> ColumnGroups | None:
    """The statistics of ``qtensor``, whose groups run along outputs.

    ``None`` where a zero point is farther than `FARTHEST_ZERO` from the middle code.
    """
    grid, (rows, columns) = qtensor.grid, qtensor.codes.shape
    scales = grid.scales().T
    factors = _factors(scales)
    zeros = None
    if grid.zero_point is not None:
        centred = grid.zeros().T - 2 ** (grid.bits - 1)
        if not bool((centred.abs() <= FARTHEST_ZERO).all()):
            return None
        zeros = as_pairs(centred, columns)
    size = min(grid.group_size, rows)
    pairs = as_pairs(scales / factors.unsqueeze(1), columns)
    return ColumnGroups(pairs, zeros, size, factors)


def as_pairs(values: Tensor, columns: int) -> Tensor:
    """Numbers ``[lines, columns]`` as float16, placed in pairs: ``[lines, 16, units]`` int32.

    Word ``p`` of a unit holds its numbers ``p`` (low half) and ``16 + p`` (high half); what fills
    up the last units is zero.
    """
    units = units_of(columns)
    halves = values.new_zeros(len(values), units * UNIT, dtype=torch.float16)
    halves[:, :columns] = values.half()
    pairs = halves.view(len(values), units, 2, PAIRS).permute(0, 3, 1, 2).contiguous()
    return pairs.view(torch.int32).squeeze(3)


def half_bits(values: Tensor) -> Tensor:
    """The bits of ``values`` as float16, int32 from 0 to 65535."""
    return values.half().view(torch.int16).int() & 0xFFFF


def _factors(scales: Tensor) -> Tensor:
    """The power of two above the largest magnitude of each line of ``scales``, 1 for zeros.

    Args:
        scales: ``[lines, values]`` float32.
    """
    largest = scales.abs().amax(1)
    powers = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    return torch.where(largest > 0, powers, 1.0)


def _tile(grid: Grid, rows: int) -> int:
    """Number of rows that share second grids."""
    stored = (grid.scale, grid.zero_point)
    sizes = {s.grid.group_size for s in stored if isinstance(s, Statistic)}
    assert len(sizes) <= 1, "scales and zero points have tiles of one size"
    return min([*sizes, rows])


def _field(stored: Tensor | Statistic, bits: int) -> tuple[Tensor, int, Tensor | None]:
    """A statistic as integers ``[lines, groups]`` int32, their bits, and its second grids.

    Second grids are ``[tiles, groups]`` int32, step below zero point.
    """
    if isinstance(stored, Statistic):
        second = stored.grid
        assert isinstance(second.scale, Tensor)
        assert isinstance(second.zero_point, Tensor)
        grids = half_bits(second.scale) | half_bits(second.zero_point) << HALF_BITS
        return stored.codes.T.int(), second.bits, grids.T
    if stored.dtype == torch.uint8:
        return stored.int(), bits, None
    return half_bits(stored), HALF_BITS, None


def _by_plane(runs: Tensor, columns: int, span: int) -> Tensor:
    """``[planes, lines, groups]`` from ``[lines, runs]``, filled up with zeros."""
    planes = max(1, UNIT // span)
    count = units_of(columns) * UNIT // span
    filled = runs.new_zeros(len(runs), count)
    filled[:, : runs.shape[1]] = runs
    return filled.view(len(runs), count // planes, planes).permute(2, 0, 1)
