"""Round to nearest: every weight on its own, no data needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec, check_choice
from quantine.kernels.fit import fit_groups, fit_rows
from quantine.kernels.fit.grid_cost import DATA_FREE_CLIPS, Clip, GridCost
from quantine.statistics.hessian import Hessian


@dataclass(frozen=True)
class RTN:
    """Round to nearest.

    Attributes:
        clip: ``"minmax"`` (the textbook baseline) or ``"mse"``, see
            `quantine.kernels.fit.grid_cost.GridCost`.
    """

    clip: Clip = "minmax"
    default_spec: ClassVar[QuantSpec] = QuantSpec()
    needs_inputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("clip", self.clip, DATA_FREE_CLIPS)

    def stores_order(self, spec: QuantSpec) -> bool:
        """Never."""
        return False

    @property
    def takes_clusters(self) -> bool:
        """Always."""
        return True

    @property
    def outlier_share(self) -> float:
        """None are kept."""
        return 0.0

    def __call__(self, weight: Tensor, hessian: Hessian | None, spec: QuantSpec) -> QTensor:
        """Round ``weight`` ``[out, in]`` float32; ``hessian`` is not looked at."""
        same = weight.new_ones(weight.shape[1])
        if spec.group_axis == "in":
            grid = fit_rows(weight, same, spec, GridCost(self.clip))
        else:
            groups = weight.unflatten(0, (-1, spec.group_length(len(weight))))
            grid = fit_groups(groups, same, spec, GridCost(self.clip))
        return QTensor(grid.encode(weight), grid)
