"""GPTQ (arXiv 2210.17323): rounding with error feedback by the inverse Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quantine.core.ambient import own_state
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec, check_choice
from quantine.kernels.fit.grid_cost import CLIPS, Clip, GridCost
from quantine.methods.column_loop import ColumnLoop, Groups
from quantine.methods.small_weights import solve_multiplied
from quantine.methods.sweeps import check_sweeps, swept
from quantine.statistics.hessian import Hessian


@dataclass(frozen=True)
class GPTQ:
    """GPTQ: columns are rounded in turn, and later columns make up for the errors of earlier ones.

    Attributes:
        damp: damping: share of the Hessian's mean diagonal that is added to its diagonal.
        act_order: whether the inputs with the largest second moment are rounded first.
        groups: how groups are made, and when their grids are fitted: ``"static"``, ``"aligned"`` or
            ``"refit"``, see `quantine.methods.column_loop.GROUPS`.
        block_size: number of columns per lazy update; affects speed only, up to float rounding.
        clip: how a group's range is chosen, see `quantine.kernels.fit.grid_cost.GridCost`.
        sweeps: how many times codes are chosen once more when all others are known, see
            `quantine.methods.sweeps`; 0 as published.

    Raises:
        PlanError: a field has a value that is not allowed.
    """

    damp: float = 0.01
    act_order: bool = True
    groups: Groups = "static"
    block_size: int = 128
    clip: Clip = "mse"
    sweeps: int = 0
    default_spec: ClassVar[QuantSpec] = QuantSpec()
    """The grid that a weight gets unless a plan asks for another one."""
    needs_inputs: ClassVar[bool] = True
    """``True``: error feedback needs the Hessian."""

    def __post_init__(self) -> None:
        check_choice("clip", self.clip, CLIPS)
        check_sweeps(self.sweeps)
        _ = self.loop  # refuses bad values

    @property
    def loop(self) -> ColumnLoop:
        """The column loop that runs with these parameters."""
        return ColumnLoop(self.groups, self.act_order, self.damp, self.block_size)

    def stores_order(self, spec: QuantSpec) -> bool:
        """Whether groups consist of inputs in act-order, which is then stored with the layer."""
        return self.loop.stores_order(spec)

    @property
    def takes_clusters(self) -> bool:
        """Whether groups are static: only those may differ in size, as clusters do."""
        return self.groups == "static"

    @property
    def outlier_share(self) -> float:
        """0: GPTQ rounds every weight and keeps no outliers."""
        return 0.0

    @own_state()
    def __call__(self, weight: Tensor, hessian: Hessian | None, spec: QuantSpec) -> QTensor:
        """Quantize one matrix with error feedback.

        Args:
            weight: ``[out, in]`` float32; it is not modified.
            hessian: statistics of the matrix's input.
            spec: the grid to quantize on.

        Raises:
            SolverError: there is no Hessian, or it cannot be factored; or a scale does not fit into
                float16.
        """
        factor, cost = self.loop.factor(hessian, spec), GridCost(self.clip)
        assert hessian is not None

        def solve(multiple: Tensor) -> QTensor:
            found = self.loop.solve(multiple, factor, spec, cost)
            return swept(found, multiple, hessian.matrix, factor, self.sweeps)

        return solve_multiplied(weight, spec, solve)
