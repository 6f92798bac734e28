"""Inputs of matrices that are rotated while the model runs, before they are rounded.

A rotation spreads what single channels are loud by over all of them, so that one grid suits all
(QuaRot, arXiv 2404.00456). The matrix behind holds its weight in the rotated basis, so that it puts
out what it did.
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


class RotatedInputs(nn.Module):
    """Rotates inputs, and rounds nothing.

    Args:
        channels: number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._rotation = Rotation(channels, seed=None)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate ``x`` ``[..., channels]``; the result has its shape and dtype."""
        return self._rotation.turned(x).to(x.dtype)

    def extra_repr(self) -> str:
        """One line for ``print(model)``: the number of channels."""
        return f"{self._rotation.width} channels, rotated"


class RotatedGrid(StaticGrid):
    """Rotates inputs, and rounds what each rotated channel differs from its centre by.

    Args:
        grid: the grid of these differences, whose tensors it takes.
        centre: ``[channels]`` float32, of the rotated channels.
    """

    fixed_names = (*StaticGrid.fixed_names, CENTRE)

    def __init__(self, grid: StaticGrid, centre: Tensor) -> None:
        labels = grid.get_buffer("labels")
        super().__init__(grid.bits, grid.scale, grid.zero, labels, grid.fed(), grid.reached())
        self.register_buffer(CENTRE, centre)
        self._rotation = Rotation(len(labels), seed=None)

    def to_grid(self, x: Tensor) -> Tensor:
        """The rotated ``x`` ``[..., channels]`` less `centre`, float32."""
        return self._rotation.turned(x) - self.get_buffer(CENTRE)

    def from_grid(self, x: Tensor) -> Tensor:
        """The rotated channels that ``x`` ``[..., channels]`` is the differences of."""
        return x + self.get_buffer(CENTRE)

    def check(self, name: str, channels: int, heads: int | None = None) -> None:
        """See `StaticGrid.check`."""
        super().check(name, channels, heads)
        centre = self.get_buffer(CENTRE)
        check_tensor(f"{name}.{CENTRE}", centre, torch.float32, (channels,))
        most = torch.finfo(torch.float32).max
        check_within(f"{name}.{CENTRE}", centre, -most, most)

    def extra_repr(self) -> str:
        """One line for ``print(model)``: that of `StaticGrid`, and that channels are rotated."""
        return f"{super().extra_repr()}, rotated"


@torch.no_grad()
def rotate_weight(module: nn.Module) -> None:
    """Give a matrix the weight that multiplies rotated inputs, in place.

    Args:
        module: a ``Linear``, or GPT-2's ``Conv1D``, which stores its weight transposed.
    """
    weight = module.get_parameter("weight").detach()
    plain = weight.T if is_transposed(module) else weight
    turned = Rotation(plain.shape[1], seed=None).turned(plain).to(weight.dtype)
    stored = turned.T.contiguous() if is_transposed(module) else turned
    module.weight = nn.Parameter(stored, requires_grad=False)
