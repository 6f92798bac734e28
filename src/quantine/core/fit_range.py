"""From a range to a grid: every rule by which the ends of a range become a scale and a zero point.

| rule | what it is for |
|---|---|
| `fit_whole` | weights: zero is on the grid, the zero point a whole number in the code range |
| `fit_fractional` | weights, as SpQR's published code has them: the zero point is a fraction |
| `fit_statistic` | scales and zero points themselves, on a second grid stored in float16 |
| `fit_activations` | activations: the zero point is a whole number of any size |
| `fit_activations_as_published` | activations, as RPTQ's published code has them |
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.core.grid import Grid, Statistic, encode, grouped
from quantine.errors import SolverError

SMALLEST_SCALE: Final = 2.0**-24
"""Smallest positive float16; a scale never rounds down to zero."""
LARGEST_SCALE: Final = 65504.0
"""Largest finite float16."""
SMALLEST_NORMAL: Final = 2.0**-14
"""Smallest float16 with full precision."""
SMALLEST_SHARE: Final = 2.0**-15
"""Smallest step of a second grid, as a share of its values' magnitude."""
NARROW: Final = 2.0**-10
"""A range below this share of its values' magnitude is stored as one float16 value."""
SMALLEST_ACTIVATION_SCALE: Final = 1e-8
"""Least scale of activations: a channel that only ever had one value still has a grid."""
SMALLEST_PUBLISHED_SCALE: Final = 1e-4
"""Least scale of activations in RPTQ's published code."""


def fit_whole(low: Tensor, high: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """Scale and whole zero point of the grid that covers ``[min(low, 0), max(high, 0)]``.

    Args:
        low, high: float32 of one shape, the ends of each group's range.
        bits: bits of a code.
        sym: the zero point is the middle code.

    Returns:
        ``(scale, zero)`` float32 of that shape: scales exactly representable in float16, zeros
        whole numbers in the code range.

    Raises:
        SolverError: a scale is not finite in float16.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    top = 2**bits - 1
    middle = 2 ** (bits - 1)
    if sym:
        scale = to_float16(torch.maximum(high / (top - middle), -low / middle))
        return scale, torch.full_like(scale, middle)
    scale = to_float16(_step(low, high, bits))
    return scale, (-low / scale).round_().clamp_(0, top)


def fit_fractional(low: Tensor, high: Tensor, bits: int, farthest: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid from ``low`` to ``high``, as in SpQR's published code.

    Two ranges differ from it. One whose distance from zero is at least ``farthest`` times its
    width is extended to zero: rounding a large zero point, or the scale it is multiplied with,
    would cost more than the whole width. That includes ranges of one value, which loses nothing.
    And no scale is below the smallest float16.

    Returns:
        ``(scale, zero)`` float32, not rounded; decoding ``0`` gives ``low``, the top code
        ``high``.
    """
    distant = high - low <= torch.maximum(low.abs(), high.abs()) / farthest
    low = torch.where(distant, low.clamp(max=0), low)
    high = torch.where(distant, high.clamp(min=0), high)
    scale = _step(low, high, bits).clamp_(min=SMALLEST_SCALE)
    return scale, -low / scale


def fit_statistic(values: Tensor, bits: int, group_size: int) -> Statistic:
    """``values`` ``[groups, lines]`` float32 on a second grid from min to max.

    Args:
        values: scales, or zero points.
        bits: bits of their codes.
        group_size: consecutive lines that share a second grid; the last run may be shorter.

    Raises:
        SolverError: a value or its range is not finite in float16.
    """
    lines = values.shape[1]
    padded = grouped(values, group_size, fill_last=True)
    low, high = padded.aminmax(dim=-1)
    reach = torch.maximum(low.abs(), high.abs())
    # Float16 must hold the step, and then the zero point.
    least = (reach * SMALLEST_SHARE).clamp_(min=SMALLEST_SCALE)
    step = _half_above(torch.maximum(_step(low, high, bits), least))
    zero = finite_half(-low / step)
    # Too narrow for float16 to tell its ends apart: one value, as the step from a zero at -1.
    single = (high - low <= NARROW * reach) & (reach >= SMALLEST_SCALE)
    step = torch.where(single, finite_half(low), step)
    zero = zero.masked_fill_(single, -1.0)
    codes = encode(padded, step.unsqueeze(-1), zero.unsqueeze(-1), bits)
    stored = codes.to(torch.uint8).flatten(1)[:, :lines]
    return Statistic(stored, Grid(step.half(), zero.half(), bits, group_size))


def fit_activations(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and whole zero point, of any size, of the grid from ``low`` to ``high``.

    Args:
        low, high: float32 of one shape.
        bits: bits of a code.

    Returns:
        ``(scale, zero)`` float32 of that shape.
    """
    scale = _step(low, high, bits).clamp_(min=SMALLEST_ACTIVATION_SCALE)
    return scale, (-low / scale).round_()


def fit_activations_around_zero(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`fit_activations` of a range that is extended to zero where it does not hold it."""
    return fit_activations(low.clamp(max=0), high.clamp(min=0), bits)


def fit_activations_as_published(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point as RPTQ's published code has them; a step of the range is wasted."""
    scale = ((high - low) / 2**bits).clamp_(min=SMALLEST_PUBLISHED_SCALE)
    zero = (-(high + low) / (2 * scale)).round_() + 2 ** (bits - 1)
    return scale, zero


def to_float16(scale: Tensor) -> Tensor:
    """Positive ``scale`` rounded to float16 values, in float32.

    Raises:
        SolverError: one is too large.
    """
    if not bool((scale <= LARGEST_SCALE).all()):
        raise SolverError(
            f"a group needs a scale of {scale.max().item():.4g}, but scales are stored in float16 "
            f"(at most {LARGEST_SCALE:g}): rescale the weights, or leave this layer in 16 bit"
        )
    return scale.clamp(min=SMALLEST_SCALE).half().float()


def finite_half(values: Tensor) -> Tensor:
    """``values`` of any sign rounded to float16, in float32.

    Raises:
        SolverError: one is too large.
    """
    rounded = values.half().float()
    if not bool(torch.isfinite(rounded).all()):
        raise SolverError(
            f"a statistic of {values.abs().max().item():.4g} does not fit into float16: rescale "
            "the weights, or leave this layer in 16 bit"
        )
    return rounded


def _step(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The distance of neighbouring values of a grid whose ends are ``low`` and ``high``."""
    step: Tensor = (high - low) / (2**bits - 1)
    return step


def _half_above(step: Tensor) -> Tensor:
    """Positive ``step`` rounded to float16, in float32: not down where float16 is coarse."""
    subnormal = (step / SMALLEST_SCALE).ceil_().mul_(SMALLEST_SCALE)
    return torch.where(step < SMALLEST_NORMAL, subnormal, finite_half(step))
