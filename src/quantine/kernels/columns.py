"""Loops of the solvers: the native kernel where it exists, else the PyTorch meaning of it.

Matrices are transposed, ``[inputs, rows]``, so that a column of the weight is contiguous. Native
and reference differ only in how float32 sums and multiply-subtracts round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from quantine.kernels import backend


def rounding_errors(columns: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """What rounding adds to ``columns`` ``[groups, n, rows]`` float32.

    Args:
        scale, zero: ``[groups, rows]`` float32, scales positive.
    """
    scale, zero = scale.unsqueeze(1), zero.unsqueeze(1)
    codes = torch.div(columns, scale).add_(zero).round_().clamp_(0, 2**bits - 1)
    return codes.sub_(zero).mul_(scale).sub_(columns)


def first_least(costs: Iterable[Tensor]) -> Tensor:
    """Index of the least of ``costs``, the first of equals; int64 of their shape."""
    stream = iter(costs)
    least = next(stream)
    best = torch.zeros(least.shape, dtype=torch.int64)
    for index, cost in enumerate(stream, 1):
        better = cost < least
        least = torch.where(better, cost, least)
        best.masked_fill_(better, index)
    return best


def cheapest_grids(
    columns: Tensor,
    importance: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    price: float = math.inf,
) -> Tensor:
    """The grid with the least sum of ``min(error**2 * importance, price)``, for each row.

    Args:
        columns: ``[groups, n, rows]`` float32.
        importance: ``[groups, n]`` float32.
        scales, zeros: ``[candidates, groups, rows]`` float32, scales positive.

    Returns:
        Index of a candidate, the first of equals, ``[groups, rows]`` int64.
    """
    native = backend.native()
    if native is None:
        return cheapest_grids_reference(columns, importance, scales, zeros, bits, price)
    best = torch.empty(scales.shape[1:], dtype=torch.int64)
    for group, weights in enumerate(columns):
        native.cheapest_grids(
            weights if weights.stride(-1) == 1 else weights.contiguous(),
            importance[group].contiguous(),
            scales[:, group].contiguous(),
            zeros[:, group].contiguous(),
            best[group],
            bits,
            price,
        )
    return best


def cheapest_grids_reference(
    columns: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, bits: int, price: float
) -> Tensor:
    """The meaning of `cheapest_grids`."""

    def cost(scale: Tensor, zero: Tensor) -> Tensor:
        squares = rounding_errors(columns, scale, zero, bits).square_()
        return squares.mul_(importance.unsqueeze(-1)).clamp_(max=price).sum(1)

    return first_least(cost(*grid) for grid in zip(scales, zeros, strict=True))


def round_columns(
    current: Tensor, local: Tensor, scales: Tensor, zeros: Tensor, bits: int, price: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round columns one by one, feeding each one's error to those behind it, in place.

    Args:
        current: ``[n, rows]`` float32, contiguous; each column ends as it was when it was rounded.
        local: ``[n, n]`` float32, their part of the factor of the inverse Hessian.
        scales, zeros: ``[n, rows]`` float32, the grid of each column; scales positive.
        price: squared scaled error above which a weight is kept as an outlier, if float16 is nearer
            to it; it then loses only what float16 rounds off.

    Returns:
        Codes ``[n, rows]`` uint8, errors divided by the factor's diagonal ``[n, rows]`` float32,
        and where weights are kept, ``[n, rows]`` bool, ``None`` if ``price`` is infinite.
    """
    native = backend.native()
    if native is None:
        return round_columns_reference(current, local, scales, zeros, bits, price)
    codes = torch.empty(current.shape, dtype=torch.uint8)
    errors = torch.empty_like(current)
    kept = torch.empty(current.shape, dtype=torch.bool) if price < math.inf else None
    shared = scales.stride(0) == 0 and zeros.stride(0) == 0
    native.round_columns(
        current,
        local.contiguous(),
        scales[:1].contiguous() if shared else scales.contiguous(),
        zeros[:1].contiguous() if shared else zeros.contiguous(),
        codes,
        errors,
        None if kept is None else kept.view(torch.uint8),
        bits,
        price,
    )
    return codes, errors, kept


def round_columns_reference(
    current: Tensor, local: Tensor, scales: Tensor, zeros: Tensor, bits: int, price: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The meaning of `round_columns`."""
    top = 2**bits - 1
    codes = torch.empty(current.shape, dtype=torch.uint8)
    errors = torch.empty_like(current)
    kept = torch.empty(current.shape, dtype=torch.bool) if price < math.inf else None
    diagonal = local.diagonal().tolist()
    for j, (column, scale, zero) in enumerate(zip(current, scales, zeros, strict=True)):
        code = torch.div(column, scale).add_(zero).round_().clamp_(0, top)
        codes[j] = code
        decoded = code.sub_(zero).mul_(scale)
        torch.sub(column, decoded, out=errors[j]).div_(diagonal[j])
        if kept is not None:
            exact = column.half().float()
            lost = torch.sub(column, exact).div_(diagonal[j])
            better = lost.abs() < errors[j].abs()  # also false where float16 overflows
            torch.logical_and(errors[j].square() > price, better, out=kept[j])
            errors[j] = torch.where(kept[j], lost, errors[j])
        current[j + 1 :].addr_(local[j, j + 1 :], errors[j], alpha=-1)
    return codes, errors, kept
