"""Rounding with error feedback, the column loop of every method that has one.

Columns are rounded one after another; what a column loses is made up by the columns still to
come, weighted by the inverse Hessian of the layer's input (GPTQ, arXiv 2210.17323, equations 2
and 3, in the Cholesky form of section 3.3). Updates inside a block of columns are applied at once,
those to the columns behind it in one matrix product (section 3.2).

A column's weight whose loss exceeds a price is an outlier: it is kept in 16 bit and loses only what
float16 rounds off (SpQR, arXiv 2306.03078, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.objective import Objective
from quantine.core.observe import Factor, Hessian
from quantine.core.permute import input_order, inverse
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.core.spec import QuantSpec, check_choice
from quantine.errors import PlanError, SolverError
from quantine.kernels.columns import AtReach, Columns, round_block
from quantine.kernels.fit import Fitted, fit_groups

Groups = Literal["static", "aligned", "refit"]
GROUPS: Final[tuple[Groups, ...]] = ("static", "aligned", "refit")
"""How groups are made, and when their grids are fitted.

``"static"``: of consecutive inputs; grids are fitted to the original weights before the loop.
``"aligned"``: of consecutive inputs, rounded one group after another; a grid is
fitted when the loop reaches it. ``"refit"``: of inputs in solving order, likewise; that order is
stored with the layer unless it is the inputs' own.
"""


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
        self, weight: Tensor, factor: Factor, spec: QuantSpec, objective: Objective
    ) -> QTensor:
        """Round ``weight`` ``[out, in]`` float32.

        Args:
            objective: of grids; its price is the loss, ``error**2 / d**2``, above which a weight
                is kept as an outlier.

        Raises:
            SolverError: a scale does not fit into float16.
        """
        order, length = factor.order, spec.group_length(weight.shape[1])
        spread = factor.upper.diagonal().contiguous()
        if self.groups == "static":
            members = weight.T.unflatten(0, (-1, length))
            in_place = spread[inverse(order)].unflatten(0, (-1, length))
            grid = fit_groups(members, in_place, spec, objective)
            values = grid.scales().T.contiguous(), grid.zeros().T.contiguous()
            columns = Columns.of(
                weight, factor, grid.bits, values, order // length, objective.price
            )
            self._round(columns, length=1)
            return _result(columns, grid, inverse(order), None)
        fitted = Fitted.empty(len(order) // length, len(weight), length, spec)
        columns = Columns.of(
            weight,
            factor,
            spec.bits,
            (fitted.scale.values, fitted.zero.values),
            torch.arange(len(order)) // length,
            objective.price,
            AtReach(fitted, spread, objective),
        )
        self._round(columns, length)
        if self.groups == "refit":
            return _result(columns, fitted.grid(), None, order if self.stores_order else None)
        places = inverse(order[::length] // length)
        return _result(columns, fitted.grid(places), inverse(order), None)

    def _round(self, columns: Columns, length: int) -> None:
        for start, stop in _blocks(len(columns.weights), length, self.block_size):
            round_block(columns, start, stop)
            columns.weights[stop:].addmm_(
                columns.upper[start:stop, stop:].T, columns.errors[start:stop], alpha=-1
            )


def _result(columns: Columns, grid: Grid, order: Tensor | None, in_perm: Tensor | None) -> QTensor:
    """The rounded ``columns``, column ``order[j]`` as number ``j``."""
    codes = columns.codes if order is None else columns.codes[order]
    outliers = None
    if columns.kept is not None:
        places, rows = columns.kept.nonzero(as_tuple=True)
        values = columns.weights[places, rows]
        places = places if order is None else inverse(order)[places]
        inputs, out_features = columns.kept.shape
        outliers = Csr.of_entries(rows, places, values, (out_features, inputs))
    return QTensor(codes.T.contiguous(), grid, in_perm, outliers)


def _blocks(count: int, length: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Cut ``count`` columns into blocks of about ``block_size``: whole groups, or part of one.

    A group of ``length`` columns is thus fitted when every update before it is applied.
    """
    if length <= block_size:
        width = block_size // length * length
        yield from ((start, min(start + width, count)) for start in range(0, count, width))
        return
    for group in range(0, count, length):
        end = min(group + length, count)
        yield from (
            (start, min(start + block_size, end)) for start in range(group, end, block_size)
        )
