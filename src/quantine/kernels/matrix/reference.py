"""The meaning of `quantine.kernels.matrix.multiply`, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from quantine.core.arithmetic import Arithmetic
from quantine.core.grid import Grid
from quantine.core.qtensor import QTensor

BLOCK: Final = 64
"""Inputs that share a scale of rounded activations, at most."""


LARGEST_CODE: Final = 127 * 256 + 127
"""Of activations: high and low part both fit 8 bits with a sign."""


SMALLEST: Final = 1e-33
"""Blocks of activations that do not reach this are rounded to zero."""


def multiply_reference(qtensor: QTensor, x: Tensor, arithmetic: Arithmetic) -> Tensor:
    """What `multiply` does for one matrix: ``x @ W.T`` of ``x`` ``[batch, in]`` float32."""
    if arithmetic == "exact":
        return x @ qtensor.dequantize().T
    stored = x if qtensor.in_perm is None else x[:, qtensor.in_perm]
    grid, kept = qtensor.grid, qtensor.outliers
    centred = qtensor.codes - _of_weights(grid.zeros(), grid, qtensor.codes.shape)
    if kept is None:
        return _multiply_rounded(centred, grid, stored)
    # What an outlier adds to its code's weight meets the activations as they are. Where the grid
    # has an exact zero, the code stands for that.
    places = kept.row_indices(), kept.columns
    if has_exact_zero(grid):
        centred[places] = 0.0
    scales = _of_weights(grid.scales(), grid, qtensor.codes.shape)
    added = torch.zeros_like(centred)
    added[places] = kept.values.float() - (centred * scales)[places]
    return _multiply_rounded(centred, grid, stored) + stored @ added.T


def has_exact_zero(grid: Grid) -> bool:
    """Whether zero points are whole numbers, so that a code means zero."""
    zero = grid.zero_point
    return zero is None or (isinstance(zero, Tensor) and zero.dtype == torch.uint8)


def _of_weights(statistics: Tensor, grid: Grid, shape: torch.Size) -> Tensor:
    """``statistics`` ``[lines, groups]`` for every weight, ``[out, in]``."""
    along_inputs = grid.axis == "in"
    lengths = grid.lengths(shape[1] if along_inputs else shape[0])
    spread = statistics.repeat_interleave(torch.tensor(lengths, device=statistics.device), 1)
    return spread if along_inputs else spread.T


def _multiply_rounded(centred: Tensor, grid: Grid, stored: Tensor) -> Tensor:
    """What rounded activations make of the weights ``centred * scale``.

    Args:
        centred: ``[out, in]`` float32, codes less zero points.
        stored: ``[batch, in]`` float32.
    """
    if grid.axis == "in":
        weight = centred * _of_weights(grid.scales(), grid, centred.shape)
        return round_activations(stored, grid.lengths(stored.shape[1])) @ weight.T
    groups = zip(centred.split(grid.group_size), grid.scales().T, strict=True)
    products = [
        round_activations(stored * scale, (centred.shape[1],)) @ rows.T for rows, scale in groups
    ]
    return torch.cat(products, 1)


def round_activations(x: Tensor, groups: Sequence[int]) -> Tensor:
    """``x`` ``[batch, in]`` float32 after rounding to 16 bits, in stored column order.

    Args:
        groups: sizes of the groups of columns.
    """
    parts = []
    for group in x.split(list(groups), 1):
        for block in group.split(BLOCK, 1):
            largest = block.abs().amax(1, keepdim=True)
            # A number over a tensor would be its reciprocal times the number: another rounding.
            quotient = torch.full_like(largest, LARGEST_CODE).div_(largest)
            inverse = torch.where(largest > SMALLEST, quotient, 0.0)
            parts.append((block * inverse).round_() * (largest / LARGEST_CODE))
    return torch.cat(parts, 1)
