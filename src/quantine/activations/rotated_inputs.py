"""Inputs of matrices that are rotated while the model runs, before they are rounded.

A rotation spreads what single channels are loud by over all of them, so that one grid suits all
(QuaRot, arXiv 2404.00456). Before, channels that are loud all the time are divided by a number of
their own (SmoothQuant, arXiv 2211.10438). The matrix behind holds a weight that undoes both, so
that it puts out what it did.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from quantine.activations.grids import StaticGrid
from quantine.activations.stored import check_tensor, check_within
from quantine.core.rotation import Rotation
from quantine.families.layers import is_transposed

CENTRE: Final = "centre"
"""Name of the tensor of a `RotatedGrid` that holds the centres of rotated channels."""
SMOOTHING: Final = "smoothing"
"""Name of the one that holds what channels are divided by before they are rotated."""
MOST_SMOOTHING: Final = 2.0**20
"""Largest of these divisors, and the inverse of the smallest: `quantine.rptq.smoothing` makes none
beyond, so that they neither overflow nor take a channel away."""


class RotatedInputs(nn.Module):
    """Divides inputs and rotates them, and rounds nothing.

    Args:
        smoothing: ``[channels]`` float32, positive: what channels are divided by.
    """

    def __init__(self, smoothing: Tensor) -> None:
        super().__init__()
        self.register_buffer(SMOOTHING, smoothing, persistent=False)
        self._rotation = _rotation_for(smoothing)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate ``x`` ``[..., channels]``; the result has its shape and dtype."""
        return _rotated(x, self.get_buffer(SMOOTHING), self._rotation).to(x.dtype)

    def extra_repr(self) -> str:
        """One line for ``print(model)``: the number of channels."""
        return f"{self._rotation.width} channels, rotated"


class RotatedGrid(StaticGrid):
    """Rotates inputs, and rounds what each rotated channel differs from its centre by.

    Args:
        grid: the grid of these differences, whose tensors it takes.
        smoothing: as in `RotatedInputs`.
        centre: ``[channels]`` float32, of the rotated channels.
    """

    fixed_names = (*StaticGrid.fixed_names, SMOOTHING, CENTRE)

    def __init__(self, grid: StaticGrid, smoothing: Tensor, centre: Tensor) -> None:
        labels = grid.get_buffer("labels")
        super().__init__(grid.bits, grid.scale, grid.zero, labels, grid.fed(), grid.reached())
        self.register_buffer(SMOOTHING, smoothing)
        self.register_buffer(CENTRE, centre)
        self._rotation = _rotation_for(smoothing)

    def to_grid(self, x: Tensor) -> Tensor:
        """``x`` ``[..., channels]``, divided and rotated, less its centre, float32."""
        rotated = _rotated(x, self.get_buffer(SMOOTHING), self._rotation)
        return rotated - self.get_buffer(CENTRE)

    def from_grid(self, x: Tensor) -> Tensor:
        """The rotated channels that ``x`` ``[..., channels]`` is the differences of."""
        return x + self.get_buffer(CENTRE)

    def check(self, name: str, channels: int, heads: int | None = None) -> None:
        """See `StaticGrid.check`."""
        super().check(name, channels, heads)
        largest = torch.finfo(torch.float32).max
        for tensor, least, most in (
            (SMOOTHING, 1 / MOST_SMOOTHING, MOST_SMOOTHING),
            (CENTRE, -largest, largest),
        ):
            found = self.get_buffer(tensor)
            check_tensor(f"{name}.{tensor}", found, torch.float32, (channels,))
            check_within(f"{name}.{tensor}", found, least, most)

    def extra_repr(self) -> str:
        """One line for ``print(model)``: that of `StaticGrid`, and that channels are rotated."""
        return f"{super().extra_repr()}, rotated"


def _rotated(x: Tensor, smoothing: Tensor, rotation: Rotation) -> Tensor:
    return rotation.turned(x.float() / smoothing)


def _rotation_for(smoothing: Tensor) -> Rotation:
    """The rotation of inputs, whose matrices are ready where those of ``smoothing`` are computed.

    Forward passes that are stopped and gone on with have to make the same calls each time.
    """
    rotation = Rotation(len(smoothing), seed=None)
    if not smoothing.is_meta:
        rotation.on(smoothing.device)
    return rotation


@torch.no_grad()
def rotate_weight(module: nn.Module, smoothing: Tensor) -> None:
    """Give a matrix the weight that multiplies rotated inputs, in place.

    Args:
        module: a ``Linear``, or GPT-2's ``Conv1D``, which stores its weight transposed.
        smoothing: as in `RotatedInputs`.
    """
    weight = module.get_parameter("weight").detach()
    plain = weight.T if is_transposed(module) else weight
    scaled = plain.float() * smoothing
    turned = Rotation(len(smoothing), seed=None).turned(scaled).to(weight.dtype)
    stored = turned.T.contiguous() if is_transposed(module) else turned
    module.weight = nn.Parameter(stored, requires_grad=False)
