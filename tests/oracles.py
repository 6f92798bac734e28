"""Slow float64 textbook versions of what the package computes fast.

Written from the mathematics, one value or one column at a time, and sharing no code with the
package: a mistake would have to be made twice to go unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SMALLEST_HALF = 2.0**-24


def half(value: float) -> float:
    """``value`` rounded to float16."""
    return float(np.float16(value))


def fit_range(low: float, high: float, bits: int, sym: bool) -> tuple[float, int]:
    """Scale and zero point of the grid that covers ``low``, ``high`` and zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    if sym:
        # Codes above the middle stand for positive values, those below for negative ones.
        scale = max(high / (top - middle), -low / middle)
        return half(max(scale, SMALLEST_HALF)), middle
    scale = half(max((high - low) / top, SMALLEST_HALF))
    return scale, min(max(round(-low / scale), 0), top)


def fit_minmax(values: Sequence[float], bits: int, sym: bool) -> tuple[float, int]:
    """Scale and zero point of the grid that covers all ``values`` and zero."""
    return fit_range(min(values), max(values), bits, sym)


def encode(value: float, scale: float, zero: int, bits: int) -> int:
    """The code whose decoded value is nearest to ``value``."""
    return min(max(round(value / scale + zero), 0), 2**bits - 1)


def decode(code: int, scale: float, zero: int) -> float:
    """What ``code`` stands for."""
    return scale * (code - zero)


def pack_row(codes: Sequence[int], bits: int) -> bytes:
    """One row of codes as a little-endian bit stream, by way of one long integer."""
    number = sum(code << (j * bits) for j, code in enumerate(codes))
    return number.to_bytes((len(codes) * bits + 7) // 8, "little")


@dataclass(frozen=True)
class Solved:
    """A solved matrix: ``codes`` and ``values`` ``[out, in]`` in input order, and the order."""

    codes: np.ndarray
    values: np.ndarray
    order: list[int]


def rtn(weight: np.ndarray, bits: int, group_size: int, sym: bool) -> Solved:
    """Round every weight to the nearest value of its group's min-max grid."""
    rows, columns = weight.shape
    codes, values = np.zeros((rows, columns), int), np.zeros((rows, columns))
    for r in range(rows):
        for start in range(0, columns, group_size):
            group = range(start, start + group_size)
            scale, zero = fit_minmax([float(weight[r, c]) for c in group], bits, sym)
            for c in group:
                codes[r, c] = encode(float(weight[r, c]), scale, zero, bits)
                values[r, c] = decode(int(codes[r, c]), scale, zero)
    return Solved(codes, values, list(range(columns)))


def damped(hessian: np.ndarray, damp: float) -> np.ndarray:
    """``H`` with dead inputs given the mean diagonal, and a share of the mean on the diagonal."""
    result = hessian.astype(np.float64).copy()
    mean = float(np.mean(np.diagonal(result)))
    for i in range(len(result)):
        if result[i, i] == 0:
            result[i, i] = mean
        result[i, i] += damp * mean
    return result


def solving_order(strength: np.ndarray, act_order: bool, aligned: int) -> list[int]:
    """Inputs by falling strength; with ``aligned``, runs of that many by falling mean strength."""
    order = list(range(len(strength)))
    if act_order and aligned:
        mean = [np.mean(strength[i // aligned * aligned :][:aligned]) for i in order]
        order.sort(key=lambda i: (-mean[i], i // aligned, -strength[i]))
    elif act_order:
        order.sort(key=lambda i: -strength[i])
    return order


def gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    bits: int,
    group_size: int,
    sym: bool,
    *,
    damp: float,
    act_order: bool,
    groups: str,
) -> Solved:
    """Round column by column with the error feedback of Optimal Brain Quantization.

    After column ``q`` is rounded, every column still to come moves by
    ``-(w_q - quantized(w_q)) / inv(H)[q, q] * inv(H)[q, :]``, and ``q`` leaves ``inv(H)`` by one
    step of Gaussian elimination. The inverse is explicit; no triangular factor is used.
    """
    rows, columns = weight.shape
    current = weight.astype(np.float64).copy()
    order = solving_order(np.diagonal(hessian), act_order, group_size if groups == "aligned" else 0)
    refit = groups != "static"
    inverse = np.linalg.inv(damped(hessian, damp))
    grids: dict[tuple[int, int], tuple[float, int]] = {}
    codes, values = np.zeros((rows, columns), int), np.zeros((rows, columns))
    for step, q in enumerate(order):
        group = step // group_size if groups == "refit" else q // group_size
        if refit and step % group_size == 0:
            for r in range(rows):
                members = [float(current[r, c]) for c in order[step : step + group_size]]
                grids[r, group] = fit_minmax(members, bits, sym)
        for r in range(rows):
            if (r, group) not in grids:  # static: from the original weights
                members = weight[r, group * group_size : (group + 1) * group_size]
                grids[r, group] = fit_minmax([float(m) for m in members], bits, sym)
            scale, zero = grids[r, group]
            codes[r, q] = encode(float(current[r, q]), scale, zero, bits)
            values[r, q] = decode(int(codes[r, q]), scale, zero)
            error = (current[r, q] - values[r, q]) / inverse[q, q]
            for c in order[step + 1 :]:
                current[r, c] -= error * inverse[q, c]
        inverse = inverse - np.outer(inverse[:, q], inverse[q, :]) / inverse[q, q]
    return Solved(codes, values, order)


def output_error(delta: np.ndarray, hessian: np.ndarray) -> float:
    """``tr(delta H delta.T)``: squared change of the layer's output, summed over tokens."""
    return float(sum(row @ hessian.astype(np.float64) @ row for row in delta.astype(np.float64)))
