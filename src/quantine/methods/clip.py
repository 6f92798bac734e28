"""Where a group's range ends: min-max, or the shrunken range with the least rounding error."""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

from quantine.core.grid import decode, encode, fit_minmax, fit_range

Clip = Literal["minmax", "mse"]
CLIPS: Final[tuple[Clip, ...]] = ("minmax", "mse")

SHRINKS: Final = tuple(1.0 - 0.025 * step for step in range(21))
"""Candidate shares of the min-max range: 1.0 down to 0.5."""
NORM: Final = 2.4
"""Exponent of the rounding error: above 2, so that a clipped large weight costs more."""
CHUNK: Final = 2**20
"""Weights searched at once: bounds the search's temporary memory to about 16 bytes each."""


def fit_groups(groups: Tensor, bits: int, sym: bool, clip: Clip) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group.

    Args:
        groups: ``[rows, groups, n]`` float32.
        clip: ``"minmax"`` covers every weight; ``"mse"`` takes, per group, the shrunken range
            whose decoded weights have the least sum of ``|error| ** 2.4``.

    Returns:
        ``(scale, zero)`` float32 ``[rows, groups]``, see `quantine.core.grid.fit_range`.
    """
    if clip == "minmax":
        return fit_minmax(groups, bits, sym)
    rows = max(1, CHUNK // max(1, groups[0].numel()))
    fits = [_search(part, bits, sym) for part in groups.split(rows)]
    return torch.cat([scale for scale, _ in fits]), torch.cat([zero for _, zero in fits])


def _search(groups: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    low, high = groups.aminmax(dim=-1)
    best_scale, best_zero = fit_range(low, high, bits, sym)
    least = _error(groups, best_scale, best_zero, bits)
    for shrink in SHRINKS[1:]:
        scale, zero = fit_range(low * shrink, high * shrink, bits, sym)
        error = _error(groups, scale, zero, bits)
        better = error < least
        least = torch.where(better, error, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _error(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    decoded = decode(encode(groups, scale, zero, bits), scale, zero)
    return decoded.sub_(groups).abs_().pow_(NORM).sum(-1)
