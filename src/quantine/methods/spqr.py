"""SpQR (arXiv 2306.03078): error feedback with outliers kept apart in 16 bit.

With whole-number zero points, ``clip="hessian"`` and aligned groups this is quantine's own variant.
The published algorithm, with its settings, is the preset ``spqr-faithful`` of
`quantine.plan.presets`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor

from quantine.core.permute import inverse
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec, check_choice
from quantine.errors import PlanError, SolverError
from quantine.kernels.fit import fit_groups
from quantine.kernels.fit.grid_cost import CLIPS, Clip, GridCost, importance_of, squared_errors
from quantine.methods.column_loop import ColumnLoop, Groups
from quantine.statistics.hessian import Hessian
from quantine.statistics.inverse_factor import InverseFactor

Detect = Literal["leave-one-out", "simple"]
DETECTS: Final[tuple[Detect, ...]] = ("leave-one-out", "simple")

LARGEST_SHARE: Final = 0.5
EQUAL: Final = 2.0**-40
"""Share of a column's mean square below which its variance means that its weights are equal."""
SAMPLED_ROWS: Final = 64
"""Output rows that stand for a matrix in searches."""
SAMPLED_RUNS: Final = 4
"""Runs of them, at least, where groups run along outputs."""
SEARCH_STEPS: Final = 12
TOLERANCE: Final = 0.03
"""Relative deviation from the wanted share of outliers that ends the search."""


@dataclass(frozen=True)
class SpQR:
    """Error feedback with outliers.

    Attributes:
        damp, act_order, groups, block_size, clip: as of `quantine.methods.gptq.GPTQ`.
        threshold: a weight is kept as an outlier when its squared error over ``d**2`` exceeds
            ``threshold`` times the matrix's mean of (variance of a column over ``d**2``);
            infinite keeps none.
        outliers: share of weights to keep; if positive, the threshold is searched for each matrix
            and ``threshold`` does not count.
        detect: ``"leave-one-out"`` fits a group's range without the weights that would raise the
            loss of the others by more than the threshold (section 4.1); ``"simple"`` does not
            look ahead.
    """

    damp: float = 0.01
    act_order: bool = True
    groups: Groups = "aligned"
    block_size: int = 128
    clip: Clip = "hessian"
    threshold: float = 0.5
    outliers: float = 0.0
    detect: Detect = "leave-one-out"
    default_spec: ClassVar[QuantSpec] = QuantSpec(4, 16, scale_bits=3, stat_group_size=64)
    needs_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("clip", self.clip, CLIPS)
        check_choice("detect", self.detect, DETECTS)
        _ = self.loop  # refuses bad values
        if not self.threshold > 0:
            raise PlanError(f"threshold must be positive, or inf for none, not {self.threshold!r}")
        if not 0 <= self.outliers <= LARGEST_SHARE:
            raise PlanError(
                f"outliers must be a share from 0 to {LARGEST_SHARE}, not {self.outliers!r}"
            )

    @property
    def loop(self) -> ColumnLoop:
        """The column loop with these parameters."""
        return ColumnLoop(self.groups, self.act_order, self.damp, self.block_size)

    def stores_order(self, spec: QuantSpec) -> bool:
        """Where groups are made of inputs in solving order."""
        return self.loop.stores_order(spec)

    @property
    def takes_clusters(self) -> bool:
        """Not yet: second grids of statistics are made for groups of one size."""
        return False

    @property
    def outlier_share(self) -> float | None:
        """Share of weights kept as outliers; ``None`` where a threshold decides."""
        if self.outliers:
            return self.outliers
        return None if self.threshold < math.inf else 0.0

    def __call__(self, weight: Tensor, hessian: Hessian | None, spec: QuantSpec) -> QTensor:
        """Solve ``weight`` ``[out, in]`` float32.

        Raises:
            SolverError: no Hessian, or it cannot be factored; a scale does not fit into float16.
        """
        factor = self.loop.factor(hessian, spec)
        solved = self._solve(weight, factor, spec, self._price(weight, factor, spec))
        share = 0.0 if solved.outliers is None else solved.outliers.entries / weight.numel()
        if self.outlier_share is None and share > LARGEST_SHARE:
            raise SolverError(
                f"{share:.0%} of the weights would be outliers, more than codes save: raise the "
                "threshold, use more bits, or keep this layer in 16 bit"
            )
        return solved

    def predict(
        self, weight: Tensor, hessian: Hessian | None, spec: QuantSpec
    ) -> tuple[Tensor, float]:
        """What solving would lose and keep, from the original weights without the column loop.

        Feedback changes single weights, but hardly their distribution.

        Returns:
            ``(loss, share)``: the mean over tokens of each output's squared error ``[out]``
            float32, and the share of weights kept as outliers.

        Raises:
            SolverError: as when solving.
        """
        factor = self.loop.factor(hessian, spec)
        assert hessian is not None
        price = self._price(weight, factor, spec)
        length = spec.group_length(spec.lines(*weight.shape)[1])
        spread = factor.upper.diagonal()
        if spec.group_axis == "in":
            columns = weight.T[factor.order].unflatten(0, (-1, length))
            spread = spread.unflatten(0, (-1, length))
        else:
            columns = weight.unflatten(0, (-1, length))
            spread = spread[inverse(factor.order)]
        grid = fit_groups(columns, spread, spec, self._cost(price))
        losses = squared_errors(columns, grid.scales().T, grid.zeros().T, spec.bits)
        losses.mul_(importance_of(spread))
        kept = losses > price
        losses.masked_fill_(kept, 0.0)
        of_outputs = losses.sum((0, 1)) if spec.group_axis == "in" else losses.sum(2).flatten()
        # The factor belongs to the Hessian in units of its mean diagonal, summed over tokens.
        unit = float(hessian.matrix.diagonal().mean()) / hessian.tokens
        return of_outputs * unit, float(kept.float().mean())

    def _solve(
        self, weight: Tensor, factor: InverseFactor, spec: QuantSpec, price: float
    ) -> QTensor:
        return self.loop.solve(weight, factor, spec, self._cost(price))

    def _cost(self, price: float) -> GridCost:
        return GridCost(self.clip, price, self.detect == "leave-one-out")

    def _price(self, weight: Tensor, factor: InverseFactor, spec: QuantSpec) -> float:
        if self.outliers:
            return self._searched_price(weight, factor, spec)
        return self.threshold * _loss_scale(weight, factor)

    def _searched_price(self, weight: Tensor, factor: InverseFactor, spec: QuantSpec) -> float:
        """The price that keeps the wanted share of a sample of rows, by bisection."""
        chosen = sampled_rows(len(weight), row_run(spec, len(weight)))
        rows = weight[chosen.to(weight.device)]
        low, high = 0.0, math.inf
        price = _loss_scale(weight, factor)
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
    """Consecutive rows that a sample may not separate, because they share groups."""
    return spec.group_length(out_features) if spec.group_axis == "out" else 1


def sampled_rows(out_features: int, run: int) -> Tensor:
    """Indices of about `SAMPLED_ROWS` rows, evenly spread over a matrix, int64 on the CPU.

    Args:
        run: rows that stay together; divides ``out_features``.
    """
    runs, wanted = out_features // run, max(SAMPLED_ROWS // run, SAMPLED_RUNS)
    starts = torch.arange(0, runs, max(1, runs // wanted), device="cpu") * run
    return (starts.unsqueeze(1) + torch.arange(run, device="cpu")).flatten()


def _loss_scale(weight: Tensor, factor: InverseFactor) -> float:
    """Mean over inputs of the variance of a column over ``d**2``; positive.

    A column of equal weights, such as that of a single row, counts with its square instead: a
    price of nothing would keep every weight.
    """
    square, centred = weight.square().mean(0), weight - weight.mean(0)
    variance = centred.square_().sum(0).div_(max(1, len(weight) - 1))
    variance = torch.where(variance > EQUAL * square, variance, square)[factor.order]
    scale = float((variance / factor.upper.diagonal().square()).mean())
    return max(scale, sys.float_info.min)
