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


def fit_whole(low: float, high: float, bits: int, sym: bool) -> tuple[float, int]:
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
    return fit_whole(min(values), max(values), bits, sym)


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
    axis: str = "in",
) -> Solved:
    """Round column by column with the error feedback of Optimal Brain Quantization.

    With ``axis`` "out" a group holds outputs of one input, and is fitted when that is reached.

    After column ``q`` is rounded, every column still to come moves by
    ``-(w_q - quantized(w_q)) / inv(H)[q, q] * inv(H)[q, :]``, and ``q`` leaves ``inv(H)`` by one
    step of Gaussian elimination. The inverse is explicit; no triangular factor is used.
    """
    rows, columns = weight.shape
    current = weight.astype(np.float64).copy()
    aligned = group_size if groups == "aligned" and axis == "in" else 0
    order = solving_order(np.diagonal(hessian), act_order, aligned)
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
            if axis == "out":
                first, group = r // group_size * group_size, -1 - q
                members = [float(m) for m in current[first : first + group_size, q]]
                if r == first:
                    found = fit_minmax(members, bits, sym)
                grids[r, group] = found
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


@dataclass(frozen=True)
class SolvedWithOutliers:
    """A matrix solved by `spqr`; columns of all fields but ``values`` are in solving order.

    Attributes:
        codes: ``[out, in]``; of an outlier it means nothing.
        scale_codes, zero_codes: ``[groups, out]``; all zero without a second level.
        outliers: value by (output, column).
        values: ``[out, in]`` in input order.
        order: the solving order.
    """

    codes: np.ndarray
    scale_codes: np.ndarray
    zero_codes: np.ndarray
    outliers: dict[tuple[int, int], float]
    values: np.ndarray
    order: list[int]


def fit_fractional(values: Sequence[float], bits: int) -> tuple[float, float]:
    """Scale and fractional zero point of the grid from the smallest to the largest value.

    Unlike SpQR's published code, a range further than 64 of its widths from zero reaches to zero,
    instead of from -1 to 1 if it is empty.
    """
    low, high = min(values), max(values)
    if high - low <= max(abs(low), abs(high)) / 64:
        low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / (2**bits - 1), SMALLEST_HALF)
    return scale, -low / scale


def second_level(values: Sequence[float], bits: int) -> tuple[list[int], list[float]]:
    """Statistics of a tile as codes on a grid whose step and zero point are float16.

    A tile of equal statistics, as far as float16 can tell, is that one value: one step above -1.
    """
    low, high = min(values), max(values)
    if high - low <= 2.0**-10 * max(abs(low), abs(high)):
        step, zero = (half(low), -1.0) if low else (1.0, 0.0)
    else:
        step = half((high - low) / (2**bits - 1))
        zero = half(-low / step)
    codes = [min(max(round(v / step + zero), 0), 2**bits - 1) for v in values]
    return codes, [step * (code - zero) for code in codes]


def rounding_loss(
    values: Sequence[float], spreads: Sequence[float], scale: float, zero: float, bits: int
) -> float:
    """Sum of ``(value - rounded)**2 / d**2``; ``spreads`` are the ``d**2``."""
    total = 0.0
    for value, spread in zip(values, spreads, strict=True):
        code = min(max(round(value / max(scale, 1e-9) + zero), 0), 2**bits - 1)
        total += (value - scale * (code - zero)) ** 2 / spread
    return total


def likely_outliers(
    values: Sequence[float], spreads: Sequence[float], bits: int, price: float
) -> list[bool]:
    """Whose absence lowers the loss of the others by more than ``price``: a refit for each."""
    whole = rounding_loss(values, spreads, *fit_fractional(values, bits), bits)
    likely = []
    for i in range(len(values)):
        others = [*values[:i], *values[i + 1 :]]
        if not others:
            return [False]
        scale, zero = fit_fractional(others, bits)
        left = rounding_loss(others, [*spreads[:i], *spreads[i + 1 :]], scale, zero, bits)
        likely.append(whole - left > price)
    return likely


def squared_spreads(inverse: np.ndarray, order: Sequence[int]) -> list[float]:
    """``d**2`` of each input in solving order: its pivot when it leaves the inverse Hessian."""
    spreads = []
    for q in order:
        spreads.append(float(inverse[q, q]))
        inverse = inverse - np.outer(inverse[:, q], inverse[q, :]) / inverse[q, q]
    return spreads


def without_likely(values: Sequence[float], likely: Sequence[bool]) -> list[float]:
    """``values`` with likely outliers replaced by the mean of the others."""
    rest = [value for value, is_out in zip(values, likely, strict=True) if not is_out]
    mean = sum(rest) / max(1, len(rest))
    return [mean if is_out else value for value, is_out in zip(values, likely, strict=True)]


def spqr(
    weight: np.ndarray,
    hessian: np.ndarray,
    bits: int,
    group_size: int,
    *,
    damp: float,
    act_order: bool,
    threshold: float,
    stat_bits: tuple[int, int] | None,
    tile: int,
) -> SolvedWithOutliers:
    """SpQR (arXiv 2306.03078, algorithm 1) with fractional zero points, groups in solving order.

    Args:
        threshold: in units of the mean over inputs of (variance of a column over ``d**2``).
        stat_bits: bits of scale and zero-point codes; ``None`` keeps both as floats.
        tile: output rows whose statistics share a second grid.
    """
    rows, columns = weight.shape
    current = weight.astype(np.float64).copy()
    order = solving_order(np.diagonal(hessian), act_order, 0)
    inverse = np.linalg.inv(damped(hessian, damp))
    spreads = squared_spreads(inverse, order)
    variances = [float(np.var(current[:, q], ddof=1)) for q in order]
    price = threshold * float(np.mean(np.divide(variances, spreads)))
    codes, values = np.zeros((rows, columns), int), np.zeros((rows, columns))
    statistic_codes = np.zeros((2, columns // group_size, rows), int)
    outliers: dict[tuple[int, int], float] = {}
    grids: list[tuple[float, float]] = []
    for step, q in enumerate(order):
        group = step // group_size
        if step % group_size == 0:
            near = spreads[step : step + group_size]
            grids = []
            for r in range(rows):
                members = [float(current[r, c]) for c in order[step : step + group_size]]
                if price < np.inf:
                    likely = likely_outliers(members, near, bits, price)
                    members = without_likely(members, likely)
                grids.append(fit_fractional(members, bits))
            for start in range(0, rows if stat_bits else 0, tile):
                part, stored = grids[start : start + tile], []
                for kind, width in enumerate(stat_bits or ()):
                    found, decoded = second_level([grid[kind] for grid in part], width)
                    statistic_codes[kind, group, start : start + tile] = found
                    stored.append(decoded)
                grids[start : start + tile] = list(zip(*stored, strict=True))
        for r in range(rows):
            scale, zero = grids[r]
            value = float(current[r, q])
            code = min(max(round(value / max(scale, 1e-9) + zero), 0), 2**bits - 1)
            values[r, q] = scale * (code - zero)
            codes[r, step] = code
            if (value - values[r, q]) ** 2 / spreads[step] > price:
                values[r, q] = outliers[r, step] = half(value)
            error = (value - values[r, q]) / inverse[q, q]
            for c in order[step + 1 :]:
                current[r, c] -= error * inverse[q, c]
        inverse = inverse - np.outer(inverse[:, q], inverse[q, :]) / inverse[q, q]
    return SolvedWithOutliers(codes, *statistic_codes, outliers, values, order)


def output_error(delta: np.ndarray, hessian: np.ndarray) -> float:
    """``tr(delta H delta.T)``: squared change of the layer's output, summed over tokens."""
    return float(sum(row @ hessian.astype(np.float64) @ row for row in delta.astype(np.float64)))


def cluster_ranges(x: np.ndarray, labels: Sequence[int], over: str) -> list[tuple[float, float]]:
    """Ends of each cluster's range over samples ``[samples, tokens, channels]``."""
    found = []
    for label in range(max(labels) + 1):
        own = x[:, :, [channel for channel, of in enumerate(labels) if of == label]]
        low, high = float(own[0].min()), float(own[0].max())
        for number, sample in enumerate(own[1:], 1):
            smallest, largest = float(sample.min()), float(sample.max())
            if over == "mean":
                low += (smallest - low) / (number + 1)
                high += (largest - high) / (number + 1)
            elif over == "running":
                low, high = 0.99 * low + 0.01 * smallest, 0.99 * high + 0.01 * largest
            else:
                low, high = min(low, smallest), max(high, largest)
        found.append((low, high))
    return found


def published_activation(value: float, low: float, high: float, bits: int) -> float:
    """``value`` on RPTQ's signed grid around a range."""
    step = max((high - low) / 2**bits, 1e-4)
    zero = round(-(high + low) / (2 * step))
    code = min(max(round(value / step) + zero, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
    return step * (code - zero)
