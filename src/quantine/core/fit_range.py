"""From a range to a grid: every rule by which the ends of a range become a scale and a zero point.

| rule | what it is for |
|---|---|
| `fit_whole` | weights: zero is on the grid, the zero point is an integer in the code range |
| `fit_fractional` | weights, as in SpQR's published code: the zero point is a fraction |
| `fit_statistic` | scales and zero points themselves, on a second grid stored in float16 |
| `fit_activations` | activations: the zero point is an integer of any size |
| `fit_activations_as_published` | activations, as in RPTQ's published code |
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.core.grid import Grid, Statistic, encode, grouped
from quantine.errors import SolverError

SMALLEST_SCALE: Final = 2.0**-24
"""Smallest positive float16, so that a scale never rounds down to zero."""
LARGEST_SCALE: Final = 65504.0
"""Largest finite float16, and thus the largest scale that can be stored."""
SMALLEST_NORMAL: Final = 2.0**-14
"""Smallest normal float16: smaller ones have fewer significant bits."""
SMALLEST_SHARE: Final = 2.0**-15
"""Smallest step of a second grid, as a share of the largest magnitude on it. A smaller step would
need a zero point too large for float16."""
NARROW: Final = 2.0**-10
"""Width of a range, as a share of its largest magnitude, up to which all its values are stored as
one: float16 could not tell its ends apart."""
SMALLEST_ACTIVATION_SHARE: Final = 2.0**-22
"""Smallest scale of activations, as a share of the largest magnitude in the range: a channel with
only one value in calibration still has a grid, and a zero point that float32 holds."""
SMALLEST_ACTIVATION_SCALE: Final = 1e-30
"""Smallest scale of activations that are all zero."""


def fit_whole(low: Tensor, high: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point of the grid that covers ``[min(low, 0), max(high, 0)]``.

    Args:
        low, high: ends of each group's range, float32 of one shape.
        bits: number of bits of one code, 2 to 8.
        sym: whether the grid is symmetric: its zero point is then the middle code,
            ``2**(bits - 1)``.

    Returns:
        ``(scale, zero)``, float32 of that shape. Scales are exactly representable in float16, zero
        points are integers in ``[0, 2**bits - 1]``.

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
    """Scale and fractional zero point of the grid from ``low`` to ``high``, as in SpQR's code.

    Two cases differ from the published code. A range whose distance from zero is at least
    ``farthest`` times its width is extended to zero: rounding a large zero point, or the scale it
    is multiplied with, would cost more than the whole width. That includes ranges of one value,
    which loses nothing. And no scale is below the smallest float16.

    Args:
        low, high: ends of each group's range, float32 of one shape.
        bits: number of bits of one code, 2 to 8.
        farthest: distance from zero, in widths of the range, from which on a range is extended to
            zero.

    Returns:
        ``(scale, zero)``, float32 of that shape, not rounded. Code 0 decodes to ``low``, code
        ``2**bits - 1`` to ``high``.
    """
    distant = high - low <= torch.maximum(low.abs(), high.abs()) / farthest
    low = torch.where(distant, low.clamp(max=0), low)
    high = torch.where(distant, high.clamp(min=0), high)
    scale = _step(low, high, bits).clamp_(min=SMALLEST_SCALE)
    return scale, -low / scale


def fit_statistic(values: Tensor, bits: int, group_size: int) -> Statistic:
    """Put scales or zero points on second grids that reach from their minimum to their maximum.

    Args:
        values: the scales, or the zero points, ``[groups, lines]`` float32.
        bits: number of bits of one code of a scale or zero point, 2 to 8.
        group_size: number of consecutive lines that share a second grid; the last run may be
            shorter.

    Returns:
        The codes of ``values`` and their second grids, whose steps and zero points are float16.

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
    # Float16 cannot tell the ends apart: code 0 then decodes to the one value, step * (0 - -1).
    single = (high - low <= NARROW * reach) & (reach >= SMALLEST_SCALE)
    step = torch.where(single, finite_half(low), step)
    zero = zero.masked_fill_(single, -1.0)
    codes = encode(padded, step.unsqueeze(-1), zero.unsqueeze(-1), bits)
    stored = codes.to(torch.uint8).flatten(1)[:, :lines]
    return Statistic(stored, Grid(step.half(), zero.half(), bits, group_size))


def fit_activations(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid from ``low`` to ``high``, for activations.

    Args:
        low, high: ends of each range, float32 of one shape.
        bits: number of bits of one code, 2 to 8.

    Returns:
        ``(scale, zero)``, float32 of that shape. Zero points are integers of any size, also outside
        of the code range.
    """
    scale = torch.maximum(_step(low, high, bits), _least_step(low, high))
    return scale, (-low / scale).round_()


def fit_activations_around_zero(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Like `fit_activations`, but a range that does not contain zero is first extended to it."""
    return fit_activations(low.clamp(max=0), high.clamp(min=0), bits)


def fit_activations_as_published(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point of activations, computed as in RPTQ's published code.

    The range is divided into ``2**bits`` steps although codes have only ``2**bits - 1``, so one
    step of the range is lost. The least scale differs: it is 1e-4 there, which would round small
    activations to nothing. Arguments and result are those of `fit_activations`.
    """
    scale = torch.maximum((high - low) / 2**bits, _least_step(low, high))
    zero = (-(high + low) / (2 * scale)).round_() + 2 ** (bits - 1)
    return scale, zero


def to_float16(scale: Tensor) -> Tensor:
    """Round positive scales to the nearest float16 value, at least `SMALLEST_SCALE`.

    Args:
        scale: float32, of any shape.

    Returns:
        Float32 of that shape, with values that float16 represents exactly.

    Raises:
        SolverError: a scale is larger than `LARGEST_SCALE`, or not a number.
    """
    if not bool((scale <= LARGEST_SCALE).all()):
        raise SolverError(
            f"a group needs a scale of {scale.max().item():.4g}, but scales are stored in float16 "
            f"(at most {LARGEST_SCALE:g}): rescale the weights, or leave this layer in 16 bit"
        )
    return scale.clamp(min=SMALLEST_SCALE).half().float()


def finite_half(values: Tensor) -> Tensor:
    """Round values of any sign to the nearest float16 value.

    Args:
        values: float32, of any shape.

    Returns:
        Float32 of that shape, with values that float16 represents exactly.

    Raises:
        SolverError: a value is too large for float16.
    """
    rounded = values.half().float()
    if not bool(torch.isfinite(rounded).all()):
        raise SolverError(
            f"a statistic of {values.abs().max().item():.4g} does not fit into float16: rescale "
            "the weights, or leave this layer in 16 bit"
        )
    return rounded


def _step(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The distance between neighbouring values of a grid that reaches from ``low`` to ``high``."""
    step: Tensor = (high - low) / (2**bits - 1)
    return step


def _least_step(low: Tensor, high: Tensor) -> Tensor:
    """The least scale of activations between ``low`` and ``high``."""
    reach = torch.maximum(low.abs(), high.abs())
    return reach.mul_(SMALLEST_ACTIVATION_SHARE).clamp_(min=SMALLEST_ACTIVATION_SCALE)


def _half_above(step: Tensor) -> Tensor:
    """Positive ``step`` rounded to a float16 value, in float32.

    Below `SMALLEST_NORMAL`, where float16 is coarse, it is rounded up.
    """
    subnormal = (step / SMALLEST_SCALE).ceil_().mul_(SMALLEST_SCALE)
    return torch.where(step < SMALLEST_NORMAL, subnormal, finite_half(step))
