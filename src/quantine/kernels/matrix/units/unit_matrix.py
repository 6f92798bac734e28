"""A packed matrix as GPUs read it: codes in units, statistics of groups, outliers by program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.kernels.matrix.reference import has_exact_zero
from quantine.kernels.matrix.units.layout import HALF_BITS, PAIRS, UNIT, pack_units, units_of
from quantine.kernels.matrix.units.statistics import (
    ColumnGroups,
    RowGroups,
    column_groups,
    half_bits,
    row_groups,
)

MOST_COLUMNS: Final = 2**16
"""Largest number of columns, those included that fill up the last units: an outlier's place among
them has 16 bits."""
SEVERAL: Final = 2**15
"""Columns above which a row takes several tiles, and registers hold the sums of few rows."""
LONG: Final = 2**12
"""Columns up to which a program with outliers has fewer rows."""
TIGHT: Final = 7
"""Bits of which registers hold 8 sums along outputs, not 16: most of their codes are in pieces."""


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

    def placed(self, matrix: UnitMatrix) -> tuple[Tensor, Tensor, Tensor]:
        """Row and input of each entry of ``matrix``, int64, and its value, float32."""
        counts = self.bounds.diff().long()
        every = torch.arange(len(counts), device=counts.device)
        # With its length given nothing waits for the device, and CUDA graphs can record it.
        programs = every.repeat_interleave(counts, output_size=len(self.words))
        rows = programs * matrix.program + self.rows.long()
        place = (self.words >> HALF_BITS).long() & 0xFFFF
        pair, half = place // 2, place % 2
        columns = pair % matrix.units * UNIT + half * PAIRS + pair // matrix.units
        if matrix.source is not None:
            columns = matrix.source.long()[columns]
        values = (self.words & 0xFFFF).to(torch.int16).view(torch.float16)
        return rows, columns, values.float()


@dataclass(frozen=True)
class UnitMatrix:
    """A packed matrix ``[rows, columns]`` as `quantine.kernels.matrix.triton` reads it.

    Attributes:
        words: ``[rows, bits, units]`` int32, see `quantine.kernels.matrix.units.layout`.
        bits: number of bits of one code.
        columns: number of inputs.
        groups: the statistics, of groups along inputs or along outputs.
        entries: the outliers, ``None`` where there are none.
        source: ``[columns]`` int32: the input of each stored column; ``None`` in input order.
        program: number of rows that one program multiplies, a power of two.
        multiplier: a power of two that all weights are multiplied with, outliers included; 1 but
            for those that are too small for float16.
    """

    words: Tensor
    bits: int
    columns: int
    groups: RowGroups | ColumnGroups
    entries: Entries | None
    source: Tensor | None
    program: int
    multiplier: float = 1.0

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return len(self.words)

    @property
    def units(self) -> int:
        """Number of units of a row."""
        return self.words.shape[2]

    def of_rows(self, rows: Tensor) -> UnitMatrix:
        """The matrix of ``rows`` ``[n]`` int64, in their order; without the outliers of this one.

        The host waits for nothing.
        """
        words, groups = self.words.index_select(0, rows), self.groups.of_rows(rows)
        return replace(self, words=words, groups=groups, entries=None, program=1)

    def parts(self) -> tuple[list[Tensor | None], list[int], float]:
        """All that the matrix consists of, as an operator of PyTorch takes it; see `of_parts`."""
        groups, entries = self.groups, self.entries
        numbers = [self.bits, self.columns, self.program]
        if isinstance(groups, RowGroups):
            tensors = [groups.words, groups.factors, groups.scale_grids, groups.zero_grids]
            numbers += [groups.tile, groups.span, groups.scale_bits, groups.zero_bits]
        else:
            tensors = [groups.scales, groups.factors, groups.zeros]
            numbers += [groups.size]
        kept = (None,) * 3 if entries is None else (entries.words, entries.rows, entries.bounds)
        return [self.words, self.source, *kept, *tensors], numbers, self.multiplier

    @classmethod
    def of_parts(
        cls,
        tensors: Sequence[Tensor | None],
        numbers: Sequence[int],
        multiplier: float,
    ) -> UnitMatrix:
        """Put together what `parts` took apart."""
        words, source, *kept = tensors[:5]
        bits, columns, program, *rest = numbers
        assert words is not None
        entries = None
        if kept[0] is not None and kept[1] is not None and kept[2] is not None:
            entries = Entries(kept[0], kept[1], kept[2])
        first, factors, *others = tensors[5:]
        assert first is not None
        assert factors is not None
        groups: RowGroups | ColumnGroups
        if len(others) == 2:
            tile, span, scale_bits, zero_bits = rest
            grids = (others[0], others[1])
            groups = RowGroups(first, span, scale_bits, zero_bits, *grids, tile, factors)
        else:
            groups = ColumnGroups(first, others[0], rest[0], factors)
        return cls(words, bits, columns, groups, entries, source, program, multiplier)


def unit_matrix(qtensor: QTensor) -> UnitMatrix | None:
    """Arrange ``qtensor``, on whatever device it is, or return ``None`` where this layout cannot.

    It holds groups of one size: along inputs multiples of 16 or all inputs, along outputs any, with
    zero points of at most `quantine.kernels.matrix.units.statistics.FARTHEST_ZERO`; and at most
    `MOST_COLUMNS` columns. Outliers whose grid has no exact zero are stored as float16 differences
    from what their codes mean, all others exactly.
    """
    multiplier = 2.0**qtensor.grid.exponent
    qtensor = _without_exponent(qtensor)
    grid, columns = qtensor.grid, qtensor.codes.shape[1]
    if grid.sizes or units_of(columns) * UNIT > MOST_COLUMNS:
        return None
    groups = row_groups(qtensor) if grid.axis == "in" else column_groups(qtensor)
    if groups is None:
        return None
    program = _program(groups, grid.bits, columns, qtensor.outliers is not None)
    codes, entries = qtensor.codes, None
    if qtensor.outliers is not None:
        codes, entries = _entries(qtensor, program)
    source = None if qtensor.in_perm is None else qtensor.in_perm.int()
    words = pack_units(codes, grid.bits)
    return UnitMatrix(words, grid.bits, columns, groups, entries, source, program, multiplier)


def _without_exponent(qtensor: QTensor) -> QTensor:
    """``qtensor`` over ``2**exponent`` of its grid."""
    exponent, kept = qtensor.grid.exponent, qtensor.outliers
    if not exponent:
        return qtensor
    if kept is not None:
        kept = replace(kept, values=kept.values.float() * 2.0**-exponent)
    return replace(qtensor, grid=replace(qtensor.grid, exponent=0), outliers=kept)


def _program(groups: RowGroups | ColumnGroups, bits: int, columns: int, outliers: bool) -> int:
    """Rows of a program: the fastest number, see docs/gpu.md, that keeps to one set of grids."""
    if isinstance(groups, ColumnGroups):
        most = 8 if bits == TIGHT else 16
        wanted, together = most if columns <= SEVERAL else 4, groups.size
    else:
        wanted, together = 2 if outliers and columns <= LONG else 4, groups.tile
    while wanted > 1 and together % wanted:
        wanted //= 2
    return wanted


def _entries(qtensor: QTensor, program: int) -> tuple[Tensor, Entries]:
    """The codes, those under outliers changed, and the outliers as what has to be added."""
    grid, kept, codes = qtensor.grid, qtensor.outliers, qtensor.codes
    assert kept is not None
    rows, columns = kept.row_indices(), kept.columns
    if has_exact_zero(grid):
        zeros = torch.zeros(codes.shape, dtype=torch.float32, device=codes.device)
        codes = codes.clone()
        codes[rows, columns] = grid.encode(zeros)[rows, columns]
        added = kept.values.float()
    else:
        added = kept.values.float() - grid.decode(codes)[rows, columns]
    programs = rows // program
    order = (programs * codes.shape[1] + columns).argsort(stable=True)
    places = _places(columns[order], units_of(codes.shape[1]))
    words = half_bits(added[order]) | places.int() << HALF_BITS
    counts = programs.bincount(minlength=-(-len(codes) // program))
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return codes, Entries(words, (rows % program)[order].to(torch.uint8), bounds)


def _places(columns: Tensor, units: int) -> Tensor:
    """Places of stored columns among arranged activations, in float16 numbers.

    See `quantine.kernels.matrix.units.activations.Arranged`.
    """
    unit, within = columns // UNIT, columns % UNIT
    return ((within % PAIRS) * units + unit) * 2 + within // PAIRS
