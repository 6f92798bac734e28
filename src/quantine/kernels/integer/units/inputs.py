"""Rows of activations, normed, brought into the order of units and rounded, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantine.core.fit_range import fit_activations
from quantine.core.grid import encode
from quantine.kernels.integer.input_grid import InputGrid
from quantine.kernels.integer.token_factors import factors, steepness
from quantine.kernels.integer.units.layout import LANES, QUADS, places_of
from quantine.kernels.matrix.units.layout import UNIT


@dataclass(frozen=True)
class Norm:
    """A norm that activations go through before they are rounded.

    A row is divided by the root of its mean square plus ``eps``, in float32.

    Attributes:
        weight: ``[channels]`` of any float dtype, by which the result is multiplied.
        bias: likewise, which is added to it; ``None`` for nothing.
        eps: what is added to the mean square.
        centred: whether the mean is taken off first, as in ``LayerNorm``, or not, as in
            ``RMSNorm``.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool


@dataclass(frozen=True)
class InputUnits:
    """How the inputs of a matrix are normed and rounded, and where their codes lie.

    Attributes:
        source: ``[32 * units]`` int32: the channel at each place, any where units are filled up.
        counts: ``[units]`` int32, number of places from the first on that are not filled up.
        bits: number of bits of one code, 2 to 8.
        columns: number of channels.
        scale, zero: ``[units]`` float32, the grid of each unit; ``None`` where every token has a
            grid of its own.
        above, below: ``[units]`` float32, `quantine.kernels.integer.token_factors.steepness` of
            these grids; ``None`` where tokens have no factors.
        order: ``[columns]`` int32: channel ``order[j]`` is input ``j`` of the matrix, which
            ``source`` allows for; ``None`` where channels are inputs as they come.
        weight, bias, eps, centred: of the `Norm`; the first two are ``None`` where there is none.
    """

    source: Tensor
    counts: Tensor
    bits: int
    columns: int
    scale: Tensor | None
    zero: Tensor | None
    above: Tensor | None
    below: Tensor | None
    order: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    centred: bool = False

    @classmethod
    def of(
        cls,
        grid: InputGrid,
        lengths: tuple[int, ...],
        in_perm: Tensor | None,
        device: torch.device,
    ) -> InputUnits:
        """The units, on ``device``, of a matrix with groups of ``lengths``.

        Args:
            grid: the grid of its inputs.
            in_perm: as of `quantine.core.qtensor.QTensor`.
        """
        places, groups = places_of(lengths, device)
        source = places.clamp(min=0)
        if in_perm is not None:
            source = in_perm[source]
        scale, zero, above, below = grid.scale, grid.zero, None, None
        if scale is not None and zero is not None:
            if grid.reach is not None:
                above, below = steepness(scale, zero, grid.bits, grid.reach)
                above, below = above[groups], below[groups]
            scale, zero = scale[groups], zero[groups]
        counts, columns = (places >= 0).view(-1, UNIT).sum(1).int(), sum(lengths)
        return cls(source.int(), counts, grid.bits, columns, scale, zero, above, below)

    @property
    def units(self) -> int:
        """Number of units of a row."""
        return len(self.counts)

    def there(self) -> Tensor:
        """Which places are not filled up, ``[32 * units]`` bool."""
        numbers = torch.arange(UNIT, device=self.counts.device)
        return (numbers < self.counts.unsqueeze(1)).flatten()

    def gathered(self, order: Tensor) -> InputUnits:
        """These units, for a row of which channel ``order[j]`` is input ``j``.

        Args:
            order: ``[channels]`` integers, as of `quantine.activations.modules.PermutedNorm`.
        """
        order = order.int()
        return replace(self, source=order[self.source.long()], order=order)

    def after(self, norm: Norm) -> InputUnits:
        """These units, for inputs that go through ``norm`` first.

        Its tensors are read whenever rows are rounded, as they are then.
        """
        return replace(self, weight=norm.weight, bias=norm.bias, eps=norm.eps, centred=norm.centred)

    def equals(self, other: InputUnits) -> bool:
        """Whether both round, on one device, the same inputs to the same codes."""
        (tensors, *rest), (others, *more) = self.parts(), other.parts()
        return rest == more and all(map(_equal, tensors, others))

    def parts(self) -> tuple[list[Tensor | None], list[int], float]:
        """All that this consists of, as an operator of PyTorch takes it; see `of_parts`."""
        grids = [self.scale, self.zero, self.above, self.below]
        tensors = [self.source, self.counts, *grids, self.order, self.weight, self.bias]
        return tensors, [self.bits, self.columns, int(self.centred)], self.eps

    @classmethod
    def of_parts(
        cls, tensors: Sequence[Tensor | None], numbers: Sequence[int], eps: float
    ) -> InputUnits:
        """Put together what `parts` took apart."""
        source, counts, scale, zero, above, below, order, weight, bias = tensors
        bits, columns, centred = numbers
        assert source is not None
        assert counts is not None
        grids = (scale, zero, above, below)
        units = cls(source, counts, bits, columns, *grids, order)
        return replace(units, weight=weight, bias=bias, eps=eps, centred=bool(centred))


@dataclass(frozen=True)
class Rounded:
    """Rows of activations as codes, in the order of units.

    A code ``c`` is kept as ``c - 2**(bits - 1)``, which is a byte with a sign; places that fill up
    units hold zero.

    Attributes:
        codes: the kept codes: ``[batch, 32 * units]`` int8; or as quads ``[batch, 8, units]``
            int32, each of four neighbouring codes, the first in its lowest byte.
        sums: ``[batch, units]`` float32, of the kept codes of each unit.
        scale: ``[batch]`` float32, by which sums of products are multiplied at the end: the token's
            factor, or the scale of its own grid; NaN for rows whose result is.
        shift: ``[batch]`` float32: how often that is taken off which the zero points of activations
            add, see `quantine.kernels.integer.units.gridded_matrix.GriddedMatrix.base`.
    """

    codes: Tensor
    sums: Tensor
    scale: Tensor
    shift: Tensor


def round_reference(x: Tensor, inputs: InputUnits, in_quads: bool = False) -> Rounded:
    """Norm and round ``x`` ``[batch, columns]`` of any float dtype."""
    there, middle = inputs.there(), 2 ** (inputs.bits - 1)
    values = _normed(x.float(), inputs)[:, inputs.source.long()]
    lost = values[:, there].isnan().any(1)
    low, high = values[:, there].aminmax(dim=1, keepdim=True)
    values = values.masked_fill(~there, 0)
    scale, shift = torch.ones_like(low), torch.ones_like(low)
    if inputs.scale is not None and inputs.zero is not None:
        steps, zeros = (t.repeat_interleave(UNIT) for t in (inputs.scale, inputs.zero))
        if inputs.above is not None and inputs.below is not None:
            ends = (t.repeat_interleave(UNIT) for t in (inputs.above, inputs.below))
            scale = factors(values, *ends)
            values = values / scale
    else:
        lost = lost | ~(high - low).isfinite().squeeze(1)
        steps, zeros = fit_activations(low, high, inputs.bits)
        scale, shift = steps, zeros - middle
    codes = (encode(values, steps, zeros, inputs.bits) - middle).masked_fill(~there, 0)
    codes = codes.masked_fill(lost[:, None], 0).to(torch.int8)
    sums = codes.view(len(x), -1, UNIT).sum(2).float()
    if in_quads:
        lanes = codes.view(len(x), -1, QUADS, LANES).transpose(1, 2).contiguous()
        codes = lanes.view(torch.int32).squeeze(3)
    scale = scale.squeeze(1).masked_fill(lost, torch.nan)
    return Rounded(codes, sums, scale, shift.squeeze(1).masked_fill(lost, 0))


def normed_reference(x: Tensor, inputs: InputUnits) -> Tensor:
    """What the norm writes of ``x`` ``[batch, columns]``, of its shape and dtype.

    Args:
        x: of any float dtype.
        inputs: made by `InputUnits.after`; `InputUnits.gathered` sets the order of the result.
    """
    normed = _normed(x.float(), inputs).to(x.dtype)
    return normed if inputs.order is None else normed[:, inputs.order.long()]


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)


def _normed(x: Tensor, inputs: InputUnits) -> Tensor:
    """Channels ``x`` ``[batch, columns]`` float32 as they come, after the norm if there is one."""
    if inputs.weight is None:
        return x
    if inputs.centred:
        x = x - x.mean(1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + inputs.eps)
    x = x * inputs.weight.float()
    return x if inputs.bias is None else x + inputs.bias.float()
