"""The rounding of weights of one column on a GPU, with the test for outliers."""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.fit.triton.programs.grids import FIRST_INFINITE, to_half
from quantine.kernels.programs.whole_numbers import nearest_code


@triton.jit
def rounded(w, scale, zero, diagonal, price, KEEPS: tl.constexpr, BITS: tl.constexpr):
    """What weights become, see `quantine.kernels.columns.columns.Columns`.

    Args:
        w, scale, zero: float32 of one shape; scales are positive.
        diagonal: of the factor of the inverse Hessian, for this column.
        KEEPS: whether outliers are kept.

    Returns:
        ``(code, keep, value, error)``: ``keep`` is false everywhere without ``KEEPS``; ``value``
        is what the weight is rounded to, and ``error`` what it loses, over ``diagonal``.
    """
    code = nearest_code(tl.div_rn(w, scale) + zero, BITS)
    value = scale * (code - zero)
    error = tl.div_rn(w - value, diagonal)
    keep = code < 0.0
    if KEEPS:
        half = to_half(w)
        lost = tl.div_rn(w - half, diagonal)
        keep = (error * error > price) & (tl.abs(lost) < tl.abs(error))
        keep &= tl.abs(w) < FIRST_INFINITE
        error = tl.where(keep, lost, error)
        value = tl.where(keep, half, value)
    return code, keep, value, error
