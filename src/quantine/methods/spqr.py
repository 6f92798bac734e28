"""SpQR (arXiv 2306.03078): error feedback with outliers kept in 16 bit.

With integer zero points, ``clip="hessian"`` and aligned groups this is quantine's own variant. The
published algorithm, with its settings, is the preset ``spqr-faithful`` of `quantine.plan.presets`.

``d`` is the diagonal entry of the inverse Hessian's factor (`quantine.statistics.inverse_factor`)
that belongs to a weight's input; a squared error over ``d**2`` is the loss that rounding causes.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor

from quantine.core.ambient import own_state
from quantine.core.permute import inverse
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec, check_choice
from quantine.errors import PlanError, SolverError, shown
from quantine.kernels.fit import fit_groups
from quantine.kernels.fit.grid_cost import CLIPS, Clip, GridCost, importance_of, squared_errors
from quantine.methods.column_loop import ColumnLoop, Groups
from quantine.methods.small_weights import exponent_of, solve_multiplied
from quantine.methods.sweeps import check_sweeps, swept
from quantine.statistics.hessian import Hessian
from quantine.statistics.inverse_factor import InverseFactor

Detect = Literal["leave-one-out", "simple"]
"""Name of a way to treat likely outliers while a group's grid is fitted, see `SpQR`."""
DETECTS: Final[tuple[Detect, ...]] = ("leave-one-out", "simple")
"""Names of both ways to treat likely outliers."""

LARGEST_SHARE: Final = 0.5
"""Largest share of a matrix's weights that may be outliers; more would cost more than codes
save."""
EQUAL: Final = 2.0**-40
"""Share of a column's mean square below which its variance means that all its weights are equal."""
SAMPLED_ROWS: Final = 64
"""Number of output rows that stand for a whole matrix in searches."""
SAMPLED_RUNS: Final = 4
"""Least number of runs of rows in that sample, where groups run along outputs and the rows of a
group stay together."""
SEARCH_STEPS: Final = 12
"""Most steps of the search for the threshold that keeps a wanted share of outliers."""
TOLERANCE: Final = 0.03
"""Deviation from the wanted share of outliers, relative to it, at which the search ends."""


@dataclass(frozen=True)
class SpQR:
    """SpQR: error feedback like GPTQ's, with the weights that are hardest to round kept in 16 bit.

    Attributes:
        damp, act_order, groups, block_size, clip: as in `quantine.methods.gptq.GPTQ`.
        threshold: a weight is kept as an outlier when its squared error over ``d**2`` exceeds
            ``threshold`` times the matrix's mean of (variance of a column over ``d**2``). Infinity
            keeps none.
        outliers: share of weights to keep as outliers, 0 to 0.5. If it is positive, the threshold
            is searched for in each matrix and ``threshold`` is not used.
        detect: ``"leave-one-out"`` fits a group's range without the weights that would raise the
            loss of the others by more than the threshold (section 4.1); ``"simple"`` fits it to all
            weights.
        sweeps: as in `quantine.methods.gptq.GPTQ`; outliers stay as they are.

    Raises:
        PlanError: a field has a value that is not allowed.
    """

    damp: float = 0.01
    act_order: bool = True
    groups: Groups = "aligned"
    block_size: int = 128
    clip: Clip = "hessian"
    threshold: float = 0.5
    outliers: float = 0.0
    detect: Detect = "leave-one-out"
    sweeps: int = 0
    default_spec: ClassVar[QuantSpec] = QuantSpec(4, 16, scale_bits=3, stat_group_size=64)
    """The grid that a weight gets unless a plan asks for another one."""
    needs_inputs: ClassVar[bool] = True
    """``True``: error feedback needs the Hessian."""

    def __post_init__(self) -> None:
        check_choice("clip", self.clip, CLIPS)
        check_choice("detect", self.detect, DETECTS)
        check_sweeps(self.sweeps)
        _ = self.loop  # refuses bad values
        if not self.threshold > 0:
            raise PlanError(
                f"threshold must be positive, or inf for none, not {shown(self.threshold)}"
            )
        if not 0 <= self.outliers <= LARGEST_SHARE:
            raise PlanError(
                f"outliers must be a share from 0 to {LARGEST_SHARE}, not {shown(self.outliers)}"
            )

    @property
    def loop(self) -> ColumnLoop:
        """The column loop that runs with these parameters."""
        return ColumnLoop(self.groups, self.act_order, self.damp, self.block_size)

    def stores_order(self, spec: QuantSpec) -> bool:
        """Whether groups consist of inputs in act-order, which is then stored with the layer."""
        return self.loop.stores_order(spec)

    @property
    def takes_clusters(self) -> bool:
        """``False``: second grids of statistics are made for groups of one size only."""
        return False

    @property
    def outlier_share(self) -> float | None:
        """Share of weights kept as outliers, 0 to 1; ``None`` where a threshold decides."""
        if self.outliers:
            return self.outliers
        return None if self.threshold < math.inf else 0.0

    @own_state()
    def __call__(self, weight: Tensor, hessian: Hessian | None, spec: QuantSpec) -> QTensor:
        """Quantize one matrix with error feedback and outliers.

        Args:
            weight: ``[out, in]`` float32; it is not modified.
            hessian: statistics of the matrix's input.
            spec: the grid to quantize on.

        Raises:
            SolverError: there is no Hessian, or it cannot be factored; a scale does not fit into
                float16; or a threshold keeps more outliers than `LARGEST_SHARE`.
        """
        factor = self.loop.factor(hessian, spec)
        assert hessian is not None

        def solve(multiple: Tensor) -> QTensor:
            found = self._solve(multiple, factor, spec, self._price(multiple, factor, spec))
            return swept(found, multiple, hessian.matrix, factor, self.sweeps)

        solved = solve_multiplied(weight, spec, solve)
        share = 0.0 if solved.outliers is None else solved.outliers.entries / weight.numel()
        if self.outlier_share is None and share > LARGEST_SHARE:
            raise SolverError(
                f"{share:.0%} of the weights would be outliers, more than codes save: raise the "
                "threshold, use more bits, or keep this layer in 16 bit"
            )
        return solved

    @own_state()
    def predict(
        self, weight: Tensor, hessian: Hessian | None, spec: QuantSpec
    ) -> tuple[Tensor, float]:
        """Predict the loss and the outliers of solving a matrix, without running the column loop.

        The original weights are rounded instead: error feedback changes single weights, but hardly
        their distribution.

        Args:
            weight: ``[out, in]`` float32; may be some rows of the matrix.
            hessian: statistics of the matrix's input.
            spec: the grid to quantize on.

        Returns:
            ``(loss, share)``: the squared error of each output, averaged over tokens, ``[out]``
            float32; and the share of weights kept as outliers, 0 to 1.

        Raises:
            SolverError: there is no Hessian, or it cannot be factored; or a scale does not fit into
                float16.
        """
        spread, order = self.loop.spread(hessian, spec)
        assert hessian is not None
        exponent = exponent_of(weight, spec)
        weight = weight * 2.0**-exponent
        if self.outliers:
            price = self._searched_price(weight, self.loop.factor(hessian, spec), spec)
        else:
            price = self.threshold * _loss_scale(weight, spread, order)
        length = spec.group_length(spec.lines(*weight.shape)[1])
        if spec.group_axis == "in":
            columns = weight.T[order].unflatten(0, (-1, length))
            spread = spread.unflatten(0, (-1, length))
        else:
            columns = weight.unflatten(0, (-1, length))
            spread = spread[inverse(order)]
        grid = fit_groups(columns, spread, spec, self._cost(price))
        losses = squared_errors(columns, grid.scales().T, grid.zeros().T, spec.bits)
        losses.mul_(importance_of(spread))
        kept = losses > price
        losses.masked_fill_(kept, 0.0)
        of_outputs = losses.sum((0, 1)) if spec.group_axis == "in" else losses.sum(2).flatten()
        # The factor belongs to the Hessian in units of its mean diagonal, summed over tokens.
        unit = float(hessian.matrix.diagonal().mean()) / hessian.tokens * 4.0**exponent
        return of_outputs * unit, float(kept.float().mean())

    def _solve(
        self, weight: Tensor, factor: InverseFactor, spec: QuantSpec, price: float
    ) -> QTensor:
        return self.loop.solve(weight, factor, spec, self._cost(price))

    def _cost(self, price: float) -> GridCost:
        """How candidate grids are compared, with ``price`` as the loss of keeping an outlier."""
        return GridCost(self.clip, price, self.detect == "leave-one-out")

    def _price(self, weight: Tensor, factor: InverseFactor, spec: QuantSpec) -> float:
        """The loss, ``error**2 / d**2``, above which a weight is kept as an outlier."""
        if self.outliers:
            return self._searched_price(weight, factor, spec)
        return self.threshold * _loss_scale(weight, factor.upper.diagonal(), factor.order)

    def _searched_price(self, weight: Tensor, factor: InverseFactor, spec: QuantSpec) -> float:
        """The price that keeps the wanted share of outliers in some rows, found by bisection."""
        chosen = sampled_rows(len(weight), row_run(spec, len(weight)))
        rows = weight[chosen.to(weight.device)]
        factor = replace(factor, coupling=None)  # which joins rows that are not all chosen
        low, high = 0.0, math.inf
        price = _loss_scale(weight, factor.upper.diagonal(), factor.order)
        for _ in range(SEARCH_STEPS):
            solved = self._solve(rows, factor, spec, price)
            assert solved.outliers is not None
            share = solved.outliers.entries / rows.numel()
            if abs(share - self.outliers) <= TOLERANCE * self.outliers:
                break
            low, high = (low, price) if share < self.outliers else (price, high)
            if high == math.inf:
                price *= 4
            elif low == 0.0:
                price /= 4
            else:
                price = math.sqrt(low * high)
        return price


def row_run(spec: QuantSpec, out_features: int) -> int:
    """Number of consecutive rows that a sample must keep together because they share groups.

    Args:
        spec: the grid to quantize on.
        out_features: number of rows of the matrix.
    """
    return spec.group_length(out_features) if spec.group_axis == "out" else 1


def sampled_rows(out_features: int, run: int) -> Tensor:
    """Indices of about `SAMPLED_ROWS` rows, evenly spread over a matrix, int64 on the CPU.

    Args:
        out_features: number of rows of the matrix.
        run: number of consecutive rows that stay together; divides ``out_features``.
    """
    runs, wanted = out_features // run, max(SAMPLED_ROWS // run, SAMPLED_RUNS)
    starts = torch.arange(0, runs, max(1, runs // wanted), device="cpu") * run
    return (starts.unsqueeze(1) + torch.arange(run, device="cpu")).flatten()


def _loss_scale(weight: Tensor, spread: Tensor, order: Tensor) -> float:
    """Mean over inputs of the variance of a column over ``d**2``; positive.

    ``d`` is ``spread``, whose position ``j`` is input ``order[j]``.

    A column of equal weights, such as that of a matrix with one row, counts with its mean square
    instead: a price of zero would keep every weight.
    """
    square, centred = weight.square().mean(0), weight - weight.mean(0)
    variance = centred.square_().sum(0).div_(max(1, len(weight) - 1))
    variance = torch.where(variance > EQUAL * square, variance, square)[order]
    scale = float((variance / spread.square()).mean())
    return max(scale, sys.float_info.min)
