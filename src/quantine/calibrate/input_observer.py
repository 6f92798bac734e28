"""What is seen of the inputs of matrices while a block runs, and what ends its forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantine.calibrate.setup import CalibrationSetup
from quantine.families.layers import Layer
from quantine.kernels.gram import add_gram
from quantine.statistics.hessian import Hessian

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class Enough(Exception):
    """Raised inside a block to leave its forward pass once all observed inputs have been seen."""


class Reached(Exception):
    """Raised inside a block to leave its forward pass at the observed matrix.

    Attributes:
        x: the input ``[..., in]`` of the matrix.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


class InputObserver:
    """Sums up the Hessian of one matrix's inputs.

    Args:
        layer: the matrix.
        setup: the run.

    Attributes:
        hessian: over all inputs so far.
        seen: number of times the matrix was called.
        weights: how much each token of the batch that runs counts, ``[tokens]`` float32; ``None``
            counts all alike.
    """

    def __init__(self, layer: Layer, setup: CalibrationSetup) -> None:
        self._layer, self._setup = layer, setup
        self.hessian = Hessian(layer.in_features, add_gram, setup.device, setup.times)
        self.seen = 0
        self.weights: Tensor | None = None

    def register(self, after: Callable[[], None]) -> RemovableHandle:
        """Observe until the handle is removed; ``after`` is called after each input."""

        def look(x: Tensor) -> None:
            with torch.autocast(self._setup.device.type, enabled=False):
                self.hessian.update(as_multiplied(x, self._setup), self.weights)
            self.seen += 1
            after()

        return self._layer.observe(self._setup.model, look)


def as_multiplied(x: Tensor, setup: CalibrationSetup) -> Tensor:
    """The input ``x`` of a matrix in the dtype that it is multiplied in: bfloat16 if so asked."""
    return x.bfloat16() if setup.bfloat16 else x
