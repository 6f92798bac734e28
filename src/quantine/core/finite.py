"""A check that a tensor holds neither infinities nor NaNs."""

from __future__ import annotations

import math

from torch import Tensor


def is_finite(matrix: Tensor) -> bool:
    """Whether every value of ``matrix`` is finite: one pass over it, without a temporary tensor."""
    low, high = matrix.aminmax()  # NaN if one value is NaN
    return math.isfinite(low) and math.isfinite(high)
