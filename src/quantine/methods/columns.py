"""Rounding with error feedback, the column loop of every method that has one.

Columns are rounded one after another; what a column loses is made up by the columns still to
come, weighted by the inverse Hessian of the layer's input (GPTQ, arXiv 2210.17323, equations 2
and 3, in the Cholesky form of section 3.3). Updates inside a block of columns are applied at once,
those to the columns behind it in one matrix product (section 3.2).

A column's weight whose loss exceeds a price is an outlier: it is kept in 16 bit and loses only what
float16 rounds off (SpQR, arXiv 2306.03078, algorithm 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from quantine.core.grid import Grid, join_groups
from quantine.core.observe import Factor, Hessian
from quantine.core.permute import input_order, inverse
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.core.spec import QuantSpec, check_choice
from quantine.errors import PlanError, SolverError
from quantine.kernels.columns import round_columns
from quantine.methods.fit import positive

Groups = Literal["static", "aligned", "refit"]
GROUPS: Final[tuple[Groups, ...]] = ("static", "aligned", "refit")
"""How groups are made, and when their grids are fitted.

``"static"``: of consecutive inputs; grids are fitted to the original weights before the loop.
``"aligned"``: of consecutive inputs, rounded one group after another; a grid is
fitted when the loop reaches it. ``"refit"``: of inputs in solving order, likewise; that order is
stored with the layer unless it is the inputs' own.
"""

Fit = Callable[[Tensor, Tensor], Grid]
"""``(columns [groups, n, rows], spread [groups, n])`` to a grid; see `quantine.methods.fit`."""


@dataclass(frozen=True)
class ColumnLoop:
    """How columns are ordered and rounded.

    Attributes:
        groups: see `GROUPS`.
        act_order: strongest inputs first.
        damp: see `quantine.core.observe.factorize`.
        block_size: columns per lazy update; affects speed only, up to float rounding.
    """

    groups: Groups
    act_order: bool
    damp: float
    block_size: int

    def __post_init__(self) -> None:
        check_choice("groups", self.groups, GROUPS)
        if not 0 < self.damp <= 1:
            raise PlanError(f"damp must be above 0 and at most 1, not {self.damp!r}")
        if self.block_size < 1:
            raise PlanError(f"block_size must be positive, not {self.block_size!r}")

    @property
    def stores_order(self) -> bool:
        """Whether groups are made of inputs in an order of their own."""
        return self.act_order and self.groups == "refit"

    def factor(self, hessian: Hessian | None, spec: QuantSpec) -> Factor:
        """The factor of ``hessian`` in the order of the loop.

        Raises:
            SolverError: there is no Hessian, or it cannot be factored.
        """
        if hessian is None or hessian.tokens == 0:
            raise SolverError("error feedback needs calibration inputs, but none were observed")
        diagonal = hessian.matrix.diagonal()
        length = spec.group_length(len(diagonal)) if self.groups == "aligned" else None
        return hessian.factor(self.damp, input_order(diagonal, self.act_order, length))

    def solve(
        self, weight: Tensor, factor: Factor, spec: QuantSpec, fit: Fit, price: float = math.inf
    ) -> QTensor:
        """Round ``weight`` ``[out, in]`` float32.

        Args:
            fit: called with the current weights of groups about to be rounded, and with ``d`` of
                their inputs, the diagonal of the factor.
            price: the loss, ``error**2 / d**2``, above which a weight is kept as an outlier.

        Raises:
            SolverError: a scale does not fit into float16.
        """
        order, length = factor.order, spec.group_length(weight.shape[1])
        if self.groups == "static":
            spread = factor.upper.diagonal()[inverse(order)]
            members = weight.T.unflatten(0, (-1, length))
            grid = fit(members, spread.unflatten(0, (-1, length)))
            rounded = self._round(weight, factor, _Static(grid, order // length), price)
        else:
            source = _AtReach(fit, spec.bits, factor.upper.diagonal(), length)
            rounded = self._round(weight, factor, source, price)
            grid = source.joined(order if self.groups == "aligned" else None)
        if self.groups == "refit":
            return rounded.result(grid, order if self.stores_order else None)
        return rounded.in_order(inverse(order)).result(grid, None)

    def _round(
        self, weight: Tensor, factor: Factor, source: _Static | _AtReach, price: float
    ) -> _Rounded:
        # Transposed, so that a column of the matrix is contiguous; indexing copies the weight.
        columns = weight.T[factor.order]
        codes = torch.empty(columns.shape, dtype=torch.uint8)
        kept = torch.zeros(columns.shape, dtype=torch.bool) if price < math.inf else None
        errors = torch.empty_like(columns)
        upper = factor.upper
        for block in _blocks(len(columns), source.length, self.block_size):
            for part in block:
                scales, zeros = source.grids(part, columns)
                codes[part], errors[part], outliers = round_columns(
                    columns[part], upper[part, part], scales, zeros, source.bits, price
                )
                if kept is not None and outliers is not None:
                    kept[part] = outliers
                rest = slice(part.stop, block[-1].stop)
                columns[rest].addmm_(upper[part, rest].T, errors[part], alpha=-1)
            done, behind = slice(block[0].start, block[-1].stop), slice(block[-1].stop, None)
            columns[behind].addmm_(upper[done, behind].T, errors[done], alpha=-1)
        return _Rounded(codes, columns, kept)


@dataclass(frozen=True)
class _Rounded:
    """What the loop leaves: ``[in, out]`` codes, the weights they stand for, what is kept."""

    codes: Tensor
    columns: Tensor
    kept: Tensor | None

    def in_order(self, order: Tensor) -> _Rounded:
        kept = None if self.kept is None else self.kept[order]
        columns = self.columns if kept is None else self.columns[order]
        return _Rounded(self.codes[order], columns, kept)

    def result(self, grid: Grid, in_perm: Tensor | None) -> QTensor:
        outliers = None
        if self.kept is not None:
            outliers = Csr.where(self.kept.T, self.columns.T)
        return QTensor(self.codes.T.contiguous(), grid, in_perm, outliers)


class _Static:
    """Grids known beforehand, over consecutive inputs; ``group_of`` each position of the loop."""

    def __init__(self, grid: Grid, group_of: Tensor) -> None:
        self.bits = grid.bits
        self.length = len(group_of)  # any cut of the columns will do
        self._scales = positive(grid.scales()).T.contiguous()
        self._zeros = grid.zeros().T.contiguous()
        self._group_of = group_of

    def grids(self, part: slice, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points ``[part, out]``."""
        groups = self._group_of[part]
        return self._scales[groups], self._zeros[groups]


class _AtReach:
    """Grids that are fitted when the loop reaches the first column of a group."""

    def __init__(self, fit: Fit, bits: int, spread: Tensor, length: int) -> None:
        self.bits = bits
        self.length = length
        self._fit = fit
        self._spread = spread
        self._fitted: list[Grid] = []
        self._current: tuple[Tensor, Tensor]

    def grids(self, part: slice, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points ``[part, out]``; ``columns`` are up to date."""
        if part.start % self.length == 0:
            group = slice(part.start, part.start + self.length)
            grid = self._fit(columns[group].unsqueeze(0), self._spread[group].unsqueeze(0))
            self._fitted.append(grid)
            self._current = positive(grid.scales()).T, grid.zeros().T
        width = part.stop - part.start
        scale, zero = self._current
        return scale.expand(width, -1), zero.expand(width, -1)

    def joined(self, order: Tensor | None) -> Grid:
        """One grid of all groups: as they came, or in the order of their inputs."""
        if order is None:
            return join_groups(self._fitted)
        places = inverse(order[:: self.length] // self.length)
        return join_groups([self._fitted[place] for place in places.tolist()])


def _blocks(count: int, length: int, block_size: int) -> list[list[slice]]:
    """Cut ``count`` columns into blocks of about ``block_size``, of parts inside one group.

    A group of ``length`` columns always starts a part, when every update before it is applied.
    """
    parts = [
        slice(start, min(start + block_size, group + length, count))
        for group in range(0, count, length)
        for start in range(group, min(group + length, count), block_size)
    ]
    blocks: list[list[slice]] = []
    for part in parts:
        if not blocks or part.stop - blocks[-1][0].start > block_size:
            blocks.append([])
        blocks[-1].append(part)
    return blocks
