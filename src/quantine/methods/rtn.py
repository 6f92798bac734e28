"""Round to nearest: every weight on its own, no data needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantine.core.objective import DATA_FREE_CLIPS, Clip, Objective
from quantine.core.observe import Hessian
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec, check_choice
from quantine.kernels.fit import fit_groups
from quantine.methods.rounding import fit_rows


@dataclass(frozen=True)
class RTN:
    """Round to nearest.

    Attributes:
        clip: ``"minmax"`` (the textbook baseline) or ``"mse"``, see
            `quantine.core.objective.Objective`.
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
        same = torch.ones(weight.shape[1])
        if spec.group_axis == "in":
            grid = fit_rows(weight, same, spec, Objective(self.clip))
        else:
            groups = weight.unflatten(0, (-1, spec.group_length(len(weight))))
            grid = fit_groups(groups, same, spec, Objective(self.clip))
        return QTensor(grid.encode(weight), grid)
