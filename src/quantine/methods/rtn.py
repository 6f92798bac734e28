"""Round to nearest: every weight on its own, no data needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.observe import Hessian
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec, check_choice
from quantine.methods.clip import CLIPS, Clip, fit_groups


@dataclass(frozen=True)
class RTN:
    """Round to nearest.

    Attributes:
        clip: ``"minmax"`` (the textbook baseline) or ``"mse"``, see `quantine.methods.clip`.
    """

    clip: Clip = "minmax"
    needs_inputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("clip", self.clip, CLIPS)

    @property
    def stores_order(self) -> bool:
        """Never."""
        return False

    def __call__(self, weight: Tensor, hessian: Hessian | None, spec: QuantSpec) -> QTensor:
        """Round ``weight`` ``[out, in]`` float32; ``hessian`` is not looked at."""
        grid = fit_grid(weight, spec, self.clip)
        return QTensor(grid.encode(weight), grid)


def fit_grid(weight: Tensor, spec: QuantSpec, clip: Clip) -> Grid:
    """The grid over consecutive columns of ``weight`` ``[out, in]`` float32."""
    length = spec.group_length(weight.shape[1])
    groups = weight.reshape(weight.shape[0], -1, length)
    return make_grid(*fit_groups(groups, spec.bits, spec.sym, clip), spec, length)


def make_grid(scale: Tensor, zero: Tensor, spec: QuantSpec, length: int) -> Grid:
    """A `Grid` from float32 scales and whole-number zeros ``[out, groups]``."""
    stored_zero = None if spec.sym else zero.to(torch.uint8)
    return Grid(scale.half(), stored_zero, spec.bits, length)
