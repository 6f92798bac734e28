"""Rounding to whole numbers and to codes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_whole(x):
    """The whole number nearest to ``x``, to even on ties; magnitudes are at most ``2**22``."""
    # Adding 1.5 * 2**23 leaves no bits for fractions.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def nearest_code(x, BITS: tl.constexpr):
    """The whole number nearest to ``x``, to even on ties, among the codes of ``BITS`` bits."""
    return to_whole(tl.minimum(tl.maximum(x, 0.0), 2.0**BITS - 1))
