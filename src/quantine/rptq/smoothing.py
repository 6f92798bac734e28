"""What inputs are divided by before a rotation spreads what is left of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from quantine.core.device import for_float64

LEAST: Final = 1e-4
"""Share of the mean that a channel counts as at least: on other text it may be louder."""
SMALLEST: Final = 1e-30
"""Least of all, so that there is a logarithm."""


def least_noise(rows: Tensor, readers: Sequence[Tensor]) -> Tensor:
    """The divisors with which rounding behind a rotation changes the outputs least.

    Rounding adds noise of one size to all rotated channels, as large as all channels are together:
    ``sum a / c**2``, with ``a`` the variances of channels and ``c`` their divisors. It reaches the
    outputs through columns that are ``c`` times those of the weights: ``sum w * c**2``, with ``w``
    the squares of those. The product is least with ``c**4 = a / w``.

    Args:
        rows: ``[n, channels]`` float32, calibration values of the channels.
        readers: the matrices ``[out, channels]`` that read them.

    Returns:
        ``[channels]`` float32, positive, with a mean logarithm of 0. As `LEAST` bounds both, they
        lie within the root of ``channels / LEAST``, and of its inverse.
    """
    # Squares of very loud values overflow in float32. Means are taken off before rounding.
    energy = for_float64(rows).double().var(0, correction=0)
    squares = [for_float64(reader).double().square().sum(0) for reader in readers]
    found = (_log(energy) - _log(torch.stack(squares).sum(0))) / 4
    return (found - found.mean()).exp().float().to(rows.device)


def _log(values: Tensor) -> Tensor:
    return values.clamp(min=max(LEAST * float(values.mean()), SMALLEST)).log()
