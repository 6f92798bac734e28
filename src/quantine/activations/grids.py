"""Modules that round activations and return the floats that the codes stand for."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from quantine.activations.stored import check_tensor, check_within
from quantine.core.fit_range import fit_activations
from quantine.core.fixed_dtypes import FixedDtypes
from quantine.core.grid import decode, encode
from quantine.errors import FormatError
from quantine.kernels.integer.token_factors import factors, steepness
from quantine.kernels.kv_attention.packing import round_states

FEEDBACK: Final = "feedback"
"""Name of the optional tensor of a `StaticGrid` for error feedback among channels."""
REACH: Final = "reach"
"""Name of the optional tensor of a `StaticGrid` that sets the factors of tokens."""
SMALLEST: Final = 2.0**-149
"""Smallest positive number in float32."""
LABELS: Final = torch.int32
"""Dtype in which the clusters of channels are stored."""


class StaticGrid(FixedDtypes):
    """Rounds each channel to the grid of its cluster (RPTQ, arXiv 2304.01089).

    Args:
        bits: number of bits of one code, 2 to 8.
        scale: ``[clusters]`` float32, positive.
        zero: ``[clusters]`` float32 zero points, of any size, as a range need not hold zero. They
            are whole numbers except for keys and values, see `quantine.rptq.ranges.through`.
        labels: ``[channels]`` int32, the cluster of each channel.
        feedback: ``[heads, dim, dim]`` float16, for queries, keys and values: the channels of a
            head are then rounded one after another with error feedback, see
            `quantine.kernels.kv_attention.feedback`. ``None`` rounds each to nearest.
        reach: ``[1]`` float32: each token is divided by a factor of its own before it is rounded,
            and the result multiplied by it, see `quantine.kernels.integer.token_factors`. Zero
            points then lie in the code range, and there is no feedback. ``None`` for no factors.
    """

    tensor_names: Final = ("scale", "zero", "labels")
    fixed_names: tuple[str, ...] = (*tensor_names, FEEDBACK, REACH)

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
        for name, tensor in zip(StaticGrid.fixed_names, tensors, strict=True):
            self.register_buffer(name, tensor)

    def refit(
        self,
        scale: Tensor,
        zero: Tensor,
        feedback: Tensor | None = None,
        reach: Tensor | None = None,
    ) -> None:
        """Replace all tensors but the clusters; arguments are those of `StaticGrid`."""
        self.scale, self.zero = scale.clone(), zero.clone()
        self.feedback, self.reach = feedback, reach

    def fed(self) -> Tensor | None:
        """The tensor ``feedback`` ``[heads, dim, dim]`` float16, or ``None``."""
        return self._buffers[FEEDBACK]

    def reached(self) -> Tensor | None:
        """The tensor ``reach`` ``[1]`` float32, or ``None`` where tokens have no factors."""
        return self._buffers[REACH]

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x`` ``[..., channels]``; the result has its shape and dtype."""
        return self.from_grid(self.rounded(self.to_grid(x))).to(x.dtype)

    def to_grid(self, x: Tensor) -> Tensor:
        """What is rounded when ``x`` ``[..., channels]`` comes in: ``x`` itself."""
        return x

    def from_grid(self, x: Tensor) -> Tensor:
        """What comes out when ``x`` ``[..., channels]`` was rounded: ``x`` itself."""
        return x

    def rounded(self, x: Tensor) -> Tensor:
        """Round what `to_grid` gave, ``[..., channels]``, as float32."""
        scale, zero = self.of_channels()
        feedback = self.fed()
        if feedback is not None:
            shape = feedback.shape[:2]  # heads and their channels
            states = x.detach().reshape(1, -1, *shape).transpose(1, 2)
            found: Tensor = round_states(
                states, self.bits, scale.view(shape), zero.view(shape), feedback
            )
            return found.transpose(1, 2).reshape(x.shape)
        values, reach = x.float(), self.reached()
        if reach is None:
            return self._rounded(values, scale, zero)
        factor = factors(values, *steepness(scale, zero, self.bits, reach))
        return self._rounded(values / factor, scale, zero).mul_(factor)

    def _rounded(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return decode(encode(x, scale, zero, self.bits), scale, zero)

    def check(self, name: str, channels: int, heads: int | None = None) -> None:
        """Refuse tensors, as they were read from files, that do not round so many channels.

        Args:
            name: full name of this module, for errors.
            channels: number of channels of what is rounded.
            heads: number of heads that the channels of queries, keys or values are of, which may
                have error feedback but no factors of tokens; ``None`` for the inputs of a matrix,
                with which it is the other way round.

        Raises:
            FormatError: names the tensor.
        """
        scale, zero, labels = (self.get_buffer(tensor) for tensor in self.tensor_names)
        clusters = (max(1, scale.numel()),)
        check_tensor(f"{name}.scale", scale, torch.float32, clusters)
        check_within(f"{name}.scale", scale, SMALLEST, torch.finfo(torch.float32).max)
        check_tensor(f"{name}.zero", zero, torch.float32, clusters)
        check_tensor(f"{name}.labels", labels, LABELS, (channels,))
        check_within(f"{name}.labels", labels, 0, clusters[0] - 1)
        feedback, reach = self.fed(), self.reached()
        if feedback is not None:
            if heads is None:
                raise FormatError(f"{name}.feedback is there, but only attention has feedback")
            dim = channels // heads
            check_tensor(f"{name}.{FEEDBACK}", feedback, torch.float16, (heads, dim, dim))
        if reach is not None:
            if heads is not None:
                raise FormatError(f"{name}.reach is there, but only inputs of matrices have it")
            check_tensor(f"{name}.{REACH}", reach, torch.float32, (1,))
            check_within(f"{name}.{REACH}", reach, SMALLEST, torch.finfo(torch.float32).max)
            check_within(f"{name}.zero", zero, 0, 2**self.bits - 1)

    def extra_repr(self) -> str:
        """One line for ``print(model)``: bits, channels, clusters, and factors of tokens if any."""
        scale, labels = self.get_buffer("scale"), self.get_buffer("labels")
        shown = f"{self.bits} bit, {len(labels)} channels in {len(scale)} clusters"
        return shown if self.reached() is None else f"{shown}, a factor for each token"

    def of_channels(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each channel, ``[channels]`` float32 each."""
        labels = self.get_buffer("labels")
        scale, zero = self.get_buffer("scale"), self.get_buffer("zero")
        return scale.index_select(0, labels), zero.index_select(0, labels)


class TokenGrid(nn.Module):
    """Rounds each token to a grid from its smallest to its largest value (per-token, dynamic).

    Args:
        bits: number of bits of one code, 2 to 8.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x`` ``[..., channels]``; the result has its shape and dtype."""
        values = x.float()
        scale, zero = fit_activations(*values.aminmax(dim=-1, keepdim=True), self.bits)
        return decode(encode(values, scale, zero, self.bits), scale, zero).to(x.dtype)

    def extra_repr(self) -> str:
        """One line for ``print(model)``: the bits."""
        return f"{self.bits} bit for each token"
