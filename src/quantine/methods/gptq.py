"""GPTQ (arXiv 2210.17323): rounding with error feedback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec, check_choice
from quantine.kernels.fit.grid_cost import CLIPS, Clip, GridCost
from quantine.methods.column_loop import ColumnLoop, Groups
from quantine.statistics.hessian import Hessian


@dataclass(frozen=True)
class GPTQ:
    """Rounding with error feedback.

    Attributes:
        damp: share of the Hessian's mean diagonal added to its diagonal.
        act_order: round the inputs with the largest second moment first.
        groups: how groups are made, and when their grids are fitted: ``"static"``, ``"aligned"``
            or ``"refit"``, see `quantine.methods.column_loop.GROUPS`.
        block_size: columns per lazy update; affects speed only, up to float rounding.
        clip: how a group's range is chosen, see `quantine.kernels.fit.grid_cost.GridCost`.
    """

    damp: float = 0.01
    act_order: bool = True
    groups: Groups = "static"
    block_size: int = 128
    clip: Clip = "mse"
    default_spec: ClassVar[QuantSpec] = QuantSpec()
    needs_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("clip", self.clip, CLIPS)
        _ = self.loop  # refuses bad values

    @property
    def loop(self) -> ColumnLoop:
        """The column loop with these parameters."""
        return ColumnLoop(self.groups, self.act_order, self.damp, self.block_size)

    def stores_order(self, spec: QuantSpec) -> bool:
        """Where groups are made of inputs in solving order."""
        return self.loop.stores_order(spec)

    @property
    def takes_clusters(self) -> bool:
        """With static groups."""
        return self.groups == "static"

    @property
    def outlier_share(self) -> float:
        """None are kept."""
        return 0.0

    def __call__(self, weight: Tensor, hessian: Hessian | None, spec: QuantSpec) -> QTensor:
        """Solve ``weight`` ``[out, in]`` float32.

        Raises:
            SolverError: no Hessian, or it cannot be factored; a scale does not fit into float16.
        """
        factor = self.loop.factor(hessian, spec)
        return self.loop.solve(weight, factor, spec, GridCost(self.clip))
