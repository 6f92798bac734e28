"""A packed matrix and the grid of its inputs as GPUs read them for integer products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.kernels.integer.input_grid import InputGrid
from quantine.kernels.integer.reference import without_outliers
from quantine.kernels.integer.units.inputs import InputUnits
from quantine.kernels.integer.units.layout import pack_quads, places_of, units_in_common

MOST_WORDS: Final = 2**31 - 1
"""Largest number of words of codes, which programs count in 32 bits."""


@dataclass(frozen=True)
class Entries:
    """Outliers: what has to be added to the weights of the codes.

    Attributes:
        values: ``[entries]`` float32, times the scale of the input's grid where grids are static.
            Entries of a program's rows stand together, in the order of their places.
        places: ``[entries]`` int32, place of the input.
        rows: ``[entries]`` int32, row of the matrix.
        bounds: ``[programs + 1]`` int32: entries of program ``i`` are numbers ``bounds[i]`` to
            ``bounds[i + 1] - 1``.
    """

    values: Tensor
    places: Tensor
    rows: Tensor
    bounds: Tensor


@dataclass(frozen=True)
class GriddedMatrix:
    """A packed matrix ``[rows, columns]`` with groups along inputs, and the grid of its inputs.

    Attributes:
        words: ``[rows, bits, units]`` int32, see `quantine.kernels.integer.units.layout`.
        bits: number of bits of one code.
        scale: ``[rows, groups]`` float16 or float32.
        zero: ``[rows, groups]`` uint8, float16 or float32; ``None`` where it is ``2**(bits - 1)``
            everywhere.
        groups: ``[units]`` int32, the group of each unit.
        turns: ``[3, turns]`` int32: for runs of at most `width` units, which never cross a group,
            their first unit, the one after their last, and their group.
        common: how many neighbouring units, 1, 2 or 4, always are of one group.
        base: ``[rows]`` float32: what the zero points of activations add to an output, those less
            ``2**(bits - 1)`` of static grids; or of tokens whose own grids have one of 1.
        entries: the outliers, ``None`` where there are none.
        inputs: how inputs are rounded.
    """

    words: Tensor
    bits: int
    scale: Tensor
    zero: Tensor | None
    groups: Tensor
    turns: Tensor
    common: int
    base: Tensor
    entries: Entries | None
    inputs: InputUnits

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return len(self.words)

    @property
    def units(self) -> int:
        """Number of units of a row."""
        return self.words.shape[2]

    @property
    def program(self) -> int:
        """Rows that a program for few rows of activations multiplies, by which outliers stand."""
        return _program(self.common)

    @property
    def width(self) -> int:
        """Number of units of a turn, at most."""
        return _width(self.common)

    def outliers(self) -> list[Tensor | None]:
        """The tensors of the outliers, each ``None`` where there are no outliers."""
        kept = self.entries
        return [None] * 4 if kept is None else [kept.values, kept.places, kept.rows, kept.bounds]

    def parts(self) -> tuple[list[Tensor | None], list[int], float]:
        """What products need, as an operator of PyTorch takes it; see `of_parts`."""
        inputs, numbers, eps = self.inputs.parts()
        tensors = [self.words, self.scale, self.zero, self.groups, self.turns, self.base]
        return [*tensors, *self.outliers(), *inputs], [self.bits, self.common, *numbers], eps

    @classmethod
    def of_parts(
        cls, tensors: Sequence[Tensor | None], numbers: Sequence[int], eps: float
    ) -> GriddedMatrix:
        """Put together what `parts` took apart."""
        words, scale, zero, groups, turns, base, *rest = tensors
        assert words is not None
        assert scale is not None
        assert groups is not None
        assert turns is not None
        assert base is not None
        values, places, rows, bounds = rest[:4]
        entries = None
        if values is not None and places is not None and rows is not None and bounds is not None:
            entries = Entries(values, places, rows, bounds)
        inputs = InputUnits.of_parts(rest[4:], numbers[2:], eps)
        bits, common = numbers[:2]
        return cls(words, bits, scale, zero, groups, turns, common, base, entries, inputs)


def gridded_matrix(qtensor: QTensor, grid: InputGrid) -> GriddedMatrix | None:
    """Arrange ``qtensor`` and ``grid``, on whatever device they are, or return ``None``.

    Groups must run along inputs, and codes fill at most `MOST_WORDS` words.
    """
    weights = qtensor.grid
    if weights.axis != "in":
        return None
    lengths = weights.lengths(qtensor.codes.shape[1])
    common = units_in_common(lengths)
    places, groups = places_of(lengths, qtensor.codes.device)
    if len(qtensor.codes) * weights.bits * len(groups) > MOST_WORDS:
        return None
    codes, added = without_outliers(qtensor)
    filled = codes[:, places.clamp(min=0)].masked_fill_(places < 0, 0)
    scale: Tensor | None = None
    if isinstance(weights.scale, Tensor) and not weights.exponent:
        scale = weights.scale
    zero = weights.zero_point
    return GriddedMatrix(
        pack_quads(filled, weights.bits),
        weights.bits,
        (weights.scales() if scale is None else scale).contiguous(),
        None
        if zero is None
        else (zero if isinstance(zero, Tensor) else zero.values()).contiguous(),
        groups.int(),
        _turns(groups, _width(common)),
        common,
        _base(codes, weights, added, grid, lengths),
        None if qtensor.outliers is None else _entries(qtensor.outliers, added, grid, lengths),
        InputUnits.of(grid, lengths, qtensor.in_perm, qtensor.codes.device),
    )


def _program(common: int) -> int:
    """Rows of a program: fewer where each unit needs scales of its own in registers."""
    return max(2, common)


def _width(common: int) -> int:
    """Number of units of a turn: many products for one step in float32, few beyond a group."""
    return max(2, common)


def _turns(groups: Tensor, width: int) -> Tensor:
    """The attribute ``turns`` of `GriddedMatrix`."""
    found, start = [], 0
    for group, count in enumerate(groups.bincount().tolist()):
        end = start + count
        found += [(first, end, group) for first in range(start, end, width)]
        start = end
    return torch.tensor(found, dtype=torch.int32, device=groups.device).T.contiguous()


def _base(
    codes: Tensor, weights: Grid, added: Tensor | None, grid: InputGrid, lengths: tuple[int, ...]
) -> Tensor:
    """The attribute ``base`` of `GriddedMatrix`."""
    counts = torch.tensor(lengths, dtype=torch.int64, device=codes.device)
    sums = _sums(codes, lengths) - counts * weights.zeros().double()
    sums *= weights.scales().double()
    if added is not None:
        sums += _sums(added, lengths)
    if grid.scale is None or grid.zero is None:
        return sums.sum(1).float()
    shifts = grid.zero.double() - 2 ** (grid.bits - 1)
    return torch.mv(sums, grid.scale.double() * shifts).float()


def _sums(values: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Sums over groups ``[rows, groups]`` float64 of ``values`` ``[rows, columns]``."""
    parts = values.split(list(lengths), 1)
    return torch.stack([part.sum(1, dtype=torch.float64) for part in parts], 1)


def _entries(kept: Csr, added: Tensor | None, grid: InputGrid, lengths: tuple[int, ...]) -> Entries:
    """The outliers, of which ``added`` ``[rows, columns]`` are added to the weights of codes."""
    assert added is not None
    rows, columns = kept.row_indices(), kept.columns.long()
    values = added[rows, columns]
    if grid.scale is not None:
        spread = torch.tensor(lengths, dtype=torch.int64, device=values.device)
        values = values * grid.scale.repeat_interleave(spread)[columns]
    places, _ = places_of(lengths, values.device)
    columns = (places >= 0).nonzero().flatten()[columns]
    program = _program(units_in_common(lengths))
    programs = rows // program
    order = (programs * len(places) + columns).argsort(stable=True)
    counts = programs.bincount(minlength=-(-len(added) // program))
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return Entries(values[order], columns[order].int(), rows[order].int(), bounds)
