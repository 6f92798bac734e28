"""A packed matrix as GPUs read it: codes in units, statistics of groups, outliers by program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.kernels.matrix.reference import has_exact_zero
from quantine.kernels.matrix.units import HALF_BITS, PAIRS, UNIT, pack_units, units_of

SPANS: Final = (128, 64, 32, 16)
"""Numbers of inputs that share statistics in this layout; those of longer groups are repeated."""
MOST_COLUMNS: Final = 2**16
"""Largest number of columns, those included that fill up the last units: an outlier's place among
them has 16 bits."""


@dataclass(frozen=True)
class Fields:
    """Scales and zero points of all groups.

    Attributes:
        words: ``[planes, rows, groups]`` uint8, int16 or int32, all that a row stores of a group:
            its scale in the lowest ``scale_bits``, above it its zero point. The first of two planes
            has the groups of the first halves of units, the second those of the others.
        scale_bits: bits of a scale: 16 for a float16, else those of a code of ``scale_grids``.
        zero_bits: bits of a zero point: 16 for a float16, 0 where it is ``2**(bits - 1)``
            everywhere, else those of a whole number, or of a code of ``zero_grids``.
        scale_grids, zero_grids: second grids, ``[tiles, planes, groups]`` int32: the bits of the
            step below those of the zero point, both float16. ``None`` where there are none.
        tile: number of rows that share a second grid; all rows where there are none.
    """

    words: Tensor
    scale_bits: int
    zero_bits: int
    scale_grids: Tensor | None
    zero_grids: Tensor | None
    tile: int


@dataclass(frozen=True)
class Entries:
    """Outliers: what has to be added to the weights of the codes.

    Attributes:
        words: ``[entries]`` int32, the value as float16 in the low half, and in the high half the
            place of the input, in float16 numbers, among the arranged activations. Entries of a
            program's rows stand together, in the order of their inputs, so that a gather of
            activations touches few lines of the cache.
        rows: ``[entries]`` uint8, row within the program.
        bounds: ``[programs + 1]`` int32: entries of program ``i`` are numbers ``bounds[i]`` to
            ``bounds[i + 1] - 1``.
    """

    words: Tensor
    rows: Tensor
    bounds: Tensor


@dataclass(frozen=True)
class UnitMatrix:
    """A packed matrix ``[rows, columns]`` as the kernels of `quantine.kernels.matrix.triton` read it.

    Attributes:
        words: ``[rows, bits, units]`` int32, see `quantine.kernels.matrix.units`.
        bits: number of bits of one code.
        columns: number of inputs.
        span: number of stored columns that share statistics, one of `SPANS`.
        fields: the statistics.
        entries: the outliers, ``None`` where there are none.
        source: ``[columns]`` int32: the input of each stored column; ``None`` in input order.
        program: number of rows that one program multiplies, a power of two.
    """

    words: Tensor
    bits: int
    columns: int
    span: int
    fields: Fields
    entries: Entries | None
    source: Tensor | None
    program: int

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return len(self.words)

    @property
    def units(self) -> int:
        """Number of units of a row."""
        return self.words.shape[2]


def unit_matrix(qtensor: QTensor) -> UnitMatrix | None:
    """Arrange ``qtensor``, on whatever device it is, or return ``None`` where this layout cannot.

    It holds groups along inputs of one size that is a multiple of 16, or of all inputs, in at most
    `MOST_COLUMNS` columns. Outliers whose grid has no exact zero are stored as float16 differences
    from what their codes mean, all others exactly.
    """
    grid, (rows, columns) = qtensor.grid, qtensor.codes.shape
    span = _span(grid, columns)
    if span is None or units_of(columns) * UNIT > MOST_COLUMNS:
        return None
    tile = _tile(grid, rows)
    program = _program(columns, qtensor.outliers is not None, tile)
    codes, entries = qtensor.codes, None
    if qtensor.outliers is not None:
        codes, entries = _entries(qtensor, program)
    source = None if qtensor.in_perm is None else qtensor.in_perm.int()
    fields = _fields(grid, columns, span, tile)
    return UnitMatrix(
        pack_units(codes, grid.bits), grid.bits, columns, span, fields, entries, source, program
    )


def _span(grid: Grid, columns: int) -> int | None:
    if grid.axis != "in" or grid.sizes:
        return None
    if grid.group_size >= columns:
        return SPANS[0]
    return next((span for span in SPANS if grid.group_size % span == 0), None)


def _tile(grid: Grid, rows: int) -> int:
    """Number of rows that share second grids."""
    stored = (grid.scale, grid.zero_point)
    sizes = {s.grid.group_size for s in stored if isinstance(s, Statistic)}
    assert len(sizes) <= 1, "scales and zero points have tiles of one size"
    return min([*sizes, rows])


def _program(columns: int, outliers: bool, tile: int) -> int:
    """Rows of a program: the fastest number, see docs/gpu.md, that divides a tile's."""
    wanted = 2 if outliers and columns <= 2**12 else 4
    while wanted > 1 and tile % wanted:
        wanted //= 2
    return wanted


def _fields(grid: Grid, columns: int, span: int, tile: int) -> Fields:
    scale, scale_bits, scale_grids = _field(grid.scale, grid.bits)
    zero_bits, zero_grids = 0, None
    word = scale
    if grid.zero_point is not None:
        zero, zero_bits, zero_grids = _field(grid.zero_point, grid.bits)
        word = word | zero << scale_bits

    def spread(groups: Tensor) -> Tensor:
        return _by_plane(_repeated(groups, grid, columns, span), columns, span)

    grids = [None if g is None else spread(g).transpose(0, 1) for g in (scale_grids, zero_grids)]
    width = scale_bits + zero_bits
    dtype = torch.uint8 if width <= 8 else torch.int16 if width <= 16 else torch.int32
    words = spread(word).to(dtype).contiguous()
    contiguous = [None if g is None else g.contiguous() for g in grids]
    return Fields(words, scale_bits, zero_bits, contiguous[0], contiguous[1], tile)


def _field(stored: Tensor | Statistic, bits: int) -> tuple[Tensor, int, Tensor | None]:
    """A statistic as integers ``[lines, groups]`` int32, their bits, and its second grids.

    Second grids are ``[tiles, groups]`` int32, step below zero point.
    """
    if isinstance(stored, Statistic):
        second = stored.grid
        assert isinstance(second.scale, Tensor) and isinstance(second.zero_point, Tensor)
        grids = _half(second.scale) | _half(second.zero_point) << HALF_BITS
        return stored.codes.T.int(), second.bits, grids.T
    if stored.dtype == torch.uint8:
        return stored.int(), bits, None
    return _half(stored), HALF_BITS, None


def _half(values: Tensor) -> Tensor:
    """The bits of float16 numbers, as int32 from 0 to 65535."""
    return values.half().view(torch.int16).int() & 0xFFFF


def _repeated(groups: Tensor, grid: Grid, columns: int, span: int) -> Tensor:
    """What belongs to groups ``[lines, groups]``, for each run of ``span`` columns."""
    runs = torch.arange(-(-columns // span), device=groups.device) * span
    return groups[:, runs // min(grid.group_size, columns)]


def _by_plane(runs: Tensor, columns: int, span: int) -> Tensor:
    """``[planes, lines, groups]`` from ``[lines, runs]``, filled up with zeros."""
    planes = max(1, UNIT // span)
    count = units_of(columns) * UNIT // span
    filled = runs.new_zeros(len(runs), count)
    filled[:, : runs.shape[1]] = runs
    return filled.view(len(runs), count // planes, planes).permute(2, 0, 1)


def _entries(qtensor: QTensor, program: int) -> tuple[Tensor, Entries]:
    """The codes, those under outliers changed, and the outliers as what has to be added."""
    grid, kept, codes = qtensor.grid, qtensor.outliers, qtensor.codes
    assert kept is not None
    rows, columns = kept.row_indices(), kept.columns
    if has_exact_zero(grid):
        zeros = torch.zeros(codes.shape, device=codes.device)
        codes = codes.clone()
        codes[rows, columns] = grid.encode(zeros)[rows, columns]
        added = kept.values.float()
    else:
        added = kept.values.float() - grid.decode(codes)[rows, columns]
    programs = rows // program
    order = (programs * qtensor.codes.shape[1] + columns).argsort(stable=True)
    places = _places(columns[order], units_of(codes.shape[1]))
    words = _half(added[order]) | places.int() << HALF_BITS
    counts = programs.bincount(minlength=-(-len(codes) // program))
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return codes, Entries(words, (rows % program)[order].to(torch.uint8), bounds)


def _places(columns: Tensor, units: int) -> Tensor:
    """Places of stored columns among arranged activations, see `arranged`, in float16 numbers."""
    unit, within = columns // UNIT, columns % UNIT
    return ((within % PAIRS) * units + unit) * 2 + within // PAIRS
