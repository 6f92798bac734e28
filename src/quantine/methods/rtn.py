"""Round to nearest (RTN): each weight is rounded on its own, without calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quantine.core.ambient import own_state
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec, check_choice
from quantine.kernels.fit import fit_groups, fit_rows
from quantine.kernels.fit.grid_cost import DATA_FREE_CLIPS, Clip, GridCost
from quantine.methods.small_weights import solve_multiplied
from quantine.statistics.hessian import Hessian


@dataclass(frozen=True)
class RTN:
    """Round to nearest: each weight takes the nearest code of its group's grid.

    Attributes:
        clip: how a group's range is chosen: ``"minmax"`` (the textbook baseline) or ``"mse"``, see
            `quantine.kernels.fit.grid_cost.GridCost`.
    """

    clip: Clip = "minmax"
    default_spec: ClassVar[QuantSpec] = QuantSpec()
    """The grid that a weight gets unless a plan asks for another one."""
    needs_inputs: ClassVar[bool] = False
    """``False``: rounding to nearest needs no Hessian."""

    def __post_init__(self) -> None:
        check_choice("clip", self.clip, DATA_FREE_CLIPS)

    def stores_order(self, spec: QuantSpec) -> bool:
        """``False``: RTN keeps inputs in their given order, so results store none."""
        return False

    @property
    def takes_clusters(self) -> bool:
        """``True``: each group is rounded on its own, so groups may differ in size."""
        return True

    @property
    def outlier_share(self) -> float:
        """0: RTN rounds every weight and keeps no outliers."""
        return 0.0

    @own_state()
    def __call__(self, weight: Tensor, hessian: Hessian | None, spec: QuantSpec) -> QTensor:
        """Round every weight to the nearest code of its group's grid.

        Args:
            weight: ``[out, in]`` float32; it is not modified.
            hessian: not used.
            spec: the grid to quantize on.

        Raises:
            SolverError: a scale does not fit into float16.
        """
        return solve_multiplied(weight, spec, lambda multiple: self._rounded(multiple, spec))

    def _rounded(self, weight: Tensor, spec: QuantSpec) -> QTensor:
        same = weight.new_ones(weight.shape[1])
        if spec.group_axis == "in":
            grid = fit_rows(weight, same, spec, GridCost(self.clip))
        else:
            groups = weight.unflatten(0, (-1, spec.group_length(len(weight))))
            grid = fit_groups(groups, same, spec, GridCost(self.clip))
        return QTensor(grid.encode(weight), grid)
