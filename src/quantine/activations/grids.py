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
from quantine.kernels.kv_attention.digits import DIGIT
from quantine.kernels.kv_attention.state_grid import LARGEST_WIDTH, StateGrid

FEEDBACK: Final = "feedback"
"""Name of the optional tensor of a `StaticGrid` for error feedback among channels."""
REACH: Final = "reach"
"""Name of the optional tensor of a `StaticGrid` that sets the factors of tokens."""
HEAD_REACH: Final = "head_reach"
"""Name of the one that sets the factors of tokens in each head."""
WIDTHS: Final = "widths"
"""Name of the optional tensor of a `StaticGrid` that holds numbers of bits of clusters."""
OPTIONAL_AT: Final = {
    "query": (FEEDBACK,),
    "key": (FEEDBACK, WIDTHS),
    "value": (FEEDBACK, HEAD_REACH),
}
"""The optional tensors of grids in attention, by site; those of inputs have `REACH` alone."""
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
        head_reach: ``[heads]`` float32, for values: the same with a factor for each token in each
            head, see `quantine.kernels.kv_attention.state_codes.head_factors`.
        widths: ``[clusters]`` uint8, for keys: bits of the codes of each cluster, which are even
            numbers from 0 to 8; those of a head have ``bits`` for each channel together at most.
            ``None`` where all have ``bits``.
    """

    tensor_names: Final = ("scale", "zero", "labels")
    optional_names: Final = (FEEDBACK, REACH, HEAD_REACH, WIDTHS)
    fixed_names: tuple[str, ...] = (*tensor_names, *optional_names)

    def __init__(
        self,
        bits: int,
        scale: Tensor,
        zero: Tensor,
        labels: Tensor,
        feedback: Tensor | None = None,
        reach: Tensor | None = None,
        head_reach: Tensor | None = None,
        widths: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.bits = bits
        tensors = (scale, zero, labels, feedback, reach, head_reach, widths)
        for name, tensor in zip(StaticGrid.fixed_names, tensors, strict=True):
            self.register_buffer(name, tensor)

    def refit(
        self,
        scale: Tensor,
        zero: Tensor,
        feedback: Tensor | None = None,
        reach: Tensor | None = None,
        head_reach: Tensor | None = None,
        widths: Tensor | None = None,
    ) -> None:
        """Replace all tensors but the clusters; arguments are those of `StaticGrid`."""
        self.scale, self.zero = scale.clone(), zero.clone()
        self.feedback, self.widths = feedback, widths
        self.reach = None if reach is None else reach.clone()
        self.head_reach = None if head_reach is None else head_reach.clone()

    def fed(self) -> Tensor | None:
        """The tensor ``feedback`` ``[heads, dim, dim]`` float16, or ``None``."""
        return self._buffers[FEEDBACK]

    def reached(self) -> Tensor | None:
        """The tensor ``reach`` ``[1]`` float32, or ``None`` where tokens have no factors."""
        return self._buffers[REACH]

    def head_reached(self) -> Tensor | None:
        """The tensor ``head_reach`` ``[heads]``, or ``None`` where tokens of heads have none."""
        return self._buffers[HEAD_REACH]

    def uneven(self) -> Tensor | None:
        """The tensor ``widths`` ``[clusters]`` uint8, or ``None`` where all have ``bits``."""
        return self._buffers[WIDTHS]

    def by_head(self, dim: int) -> StateGrid:
        """The same grid of queries, keys or values, for heads of ``dim`` channels each."""
        scale, zero = (values.view(-1, dim) for values in self.of_channels())
        widths = self.uneven()
        if widths is None:
            return StateGrid(self.bits, scale, zero, self.fed(), reach=self.head_reached())
        of_channels = widths.index_select(0, self.get_buffer("labels")).view(-1, dim)
        return StateGrid.uneven(self.bits, scale, zero, self.fed(), of_channels)

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
        heads = self._heads()
        if heads is not None:
            states = x.detach().reshape(-1, heads, x.shape[-1] // heads)
            return self.by_head(states.shape[2]).rounded(states).view(x.shape)
        scale, zero = self.of_channels()
        values, reach = x.float(), self.reached()
        if reach is None:
            return self._rounded(values, scale, zero)
        factor = factors(values, *steepness(scale, zero, self.bits, reach))
        return self._rounded(values / factor, scale, zero).mul_(factor)

    def _heads(self) -> int | None:
        """How many heads channels are rounded in; ``None`` where each is rounded by itself."""
        for by_head in (self.fed(), self.head_reached()):
            if by_head is not None:
                return len(by_head)
        return 1 if self.uneven() is not None else None

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
        self._check_optional(name, channels, heads)

    def _check_optional(self, name: str, channels: int, heads: int | None) -> None:
        held = {
            leaf: tensor
            for leaf in self.optional_names
            if (tensor := self._buffers[leaf]) is not None
        }
        site = name.rpartition(".")[2]
        allowed = (REACH,) if heads is None else OPTIONAL_AT[site]
        for leaf in held:
            if leaf not in allowed:
                raise FormatError(
                    f"{name}.{leaf} is there, but grids of {site} have none: it is damaged"
                )
        if HEAD_REACH in held and FEEDBACK in held:
            raise FormatError(f"{name} has {HEAD_REACH} and {FEEDBACK}, but one excludes the other")
        count = heads or 1
        dim = channels // count
        if FEEDBACK in held:
            shape = (count, dim, dim)
            check_tensor(f"{name}.{FEEDBACK}", held[FEEDBACK], torch.float16, shape)
        for leaf in held.keys() & {REACH, HEAD_REACH}:
            check_tensor(f"{name}.{leaf}", held[leaf], torch.float32, (count,))
            check_within(f"{name}.{leaf}", held[leaf], SMALLEST, torch.finfo(torch.float32).max)
            check_within(f"{name}.zero", self.get_buffer("zero"), 0, 2**self.bits - 1)
        if WIDTHS in held:
            self._check_widths(f"{name}.{WIDTHS}", held[WIDTHS], (count, dim))

    def _check_widths(self, name: str, widths: Tensor, shape: tuple[int, int]) -> None:
        """Refuse numbers of bits of clusters; ``shape`` is that of the channels, head by head."""
        check_tensor(name, widths, torch.uint8, (self.get_buffer("scale").numel(),))
        check_within(name, widths, 0, LARGEST_WIDTH)
        if bool((widths % DIGIT).any()):
            raise FormatError(f"{name} holds odd numbers of bits: it is damaged")
        of_heads = widths.index_select(0, self.get_buffer("labels")).view(shape).sum(1)
        most = self.bits * shape[1] // DIGIT * DIGIT
        if int(of_heads.max()) > most:
            raise FormatError(
                f"{name} gives the channels of a head {int(of_heads.max())} bits, but there are "
                f"{most}: it is damaged"
            )

    def extra_repr(self) -> str:
        """One line for ``print(model)``: bits, channels, clusters, and factors of tokens if any."""
        scale, labels = self.get_buffer("scale"), self.get_buffer("labels")
        shown = f"{self.bits} bit, {len(labels)} channels in {len(scale)} clusters"
        if self.uneven() is not None:
            shown = f"{shown} of different bits"
        plain = self.reached() is None and self.head_reached() is None
        return shown if plain else f"{shown}, a factor for each token"

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
