"""Rounding of activations, as modules that give back what their codes stand for."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from quantine.core.fit_range import fit_activations
from quantine.core.fixed_dtypes import FixedDtypes
from quantine.core.grid import decode, encode
from quantine.kernels.integer.token_factors import factors, steepness
from quantine.kernels.kv_attention.packing import round_states

FEEDBACK: Final = "feedback"
"""Name of a tensor that only some static grids have."""
REACH: Final = "reach"
"""Name of another one."""
LABELS: Final = torch.int32


class StaticGrid(FixedDtypes):
    """Rounds each channel to the grid of its cluster.

    Args:
        bits: of a code, 2 to 8.
        scale: ``[clusters]`` float32, positive.
        zero: ``[clusters]`` float32, of any size, as a range need not reach zero; whole numbers
            but for keys and values, see `quantine.rptq.ranges.through`.
        labels: ``[channels]`` int32, each channel's cluster.
        feedback: ``[heads, dim, dim]`` float16, see `quantine.kernels.kv_attention.feedback`:
            channels, of one head after another, are then rounded in turn.
        reach: ``[1]`` float32: each token is divided by a factor of its own first, see
            `quantine.kernels.integer.token_factors`; what its codes stand for is multiplied by
            it. Grids then have their zero points in the code range, and no feedback.
    """

    tensor_names: Final = ("scale", "zero", "labels")
    fixed_names = (*tensor_names, FEEDBACK, REACH)

    def __init__(
        self,
        bits: int,
        scale: Tensor,
        zero: Tensor,
        labels: Tensor,
        feedback: Tensor | None = None,
        reach: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.bits = bits
        tensors = (scale, zero, labels, feedback, reach)
        for name, tensor in zip(self.fixed_names, tensors, strict=True):
            self.register_buffer(name, tensor)

    def refit(
        self,
        scale: Tensor,
        zero: Tensor,
        feedback: Tensor | None = None,
        reach: Tensor | None = None,
    ) -> None:
        """Take another scale and zero point for each cluster, another feedback and reach."""
        self.scale, self.zero = scale.clone(), zero.clone()
        self.feedback, self.reach = feedback, reach

    def fed(self) -> Tensor | None:
        """Feedback ``[heads, dim, dim]`` float16, if there is any."""
        return self._buffers[FEEDBACK]

    def reached(self) -> Tensor | None:
        """The reach ``[1]`` of factors of tokens, if they have any."""
        return self._buffers[REACH]

    def forward(self, x: Tensor) -> Tensor:
        """What the codes of ``x`` ``[..., channels]`` stand for, in its dtype."""
        scale, zero = self.of_channels()
        feedback = self.fed()
        if feedback is not None:
            shape = feedback.shape[:2]  # heads and their channels
            states = x.detach().reshape(1, -1, *shape).transpose(1, 2)
            rounded: Tensor = round_states(
                states, self.bits, scale.view(shape), zero.view(shape), feedback
            )
            return rounded.transpose(1, 2).reshape(x.shape).to(x.dtype)
        values, reach = x.float(), self.reached()
        if reach is None:
            return self._rounded(values, scale, zero).to(x.dtype)
        factor = factors(values, *steepness(scale, zero, self.bits, reach))
        return self._rounded(values / factor, scale, zero).mul_(factor).to(x.dtype)

    def _rounded(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return decode(encode(x, scale, zero, self.bits), scale, zero)

    def extra_repr(self) -> str:
        """Bits and shape."""
        scale, labels = self.get_buffer("scale"), self.get_buffer("labels")
        shown = f"{self.bits} bit, {len(labels)} channels in {len(scale)} clusters"
        return shown if self.reached() is None else f"{shown}, a factor for each token"

    def of_channels(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each channel, ``[channels]`` float32."""
        labels = self.get_buffer("labels")
        return self.get_buffer("scale")[labels], self.get_buffer("zero")[labels]


class TokenGrid(nn.Module):
    """Rounds each token to a grid over the range of its own values.

    Args:
        bits: of a code, 2 to 8.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """What the codes of ``x`` ``[..., channels]`` stand for, in its dtype."""
        values = x.float()
        scale, zero = fit_activations(*values.aminmax(dim=-1, keepdim=True), self.bits)
        return decode(encode(values, scale, zero, self.bits), scale, zero).to(x.dtype)

    def extra_repr(self) -> str:
        """Bits."""
        return f"{self.bits} bit for each token"
