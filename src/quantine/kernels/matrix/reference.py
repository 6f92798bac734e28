"""The meaning of `quantine.kernels.matrix.multiply` and `multiply_grouped`, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from quantine.core.arithmetic import Arithmetic
from quantine.core.grid import Grid
from quantine.core.qtensor import QTensor

BLOCK: Final = 64
"""Largest number of inputs whose rounded activations share a scale."""


LARGEST_CODE: Final = 127 * 256 + 127
"""Largest code of a rounded activation: its high and low byte both fit 8 bits with a sign."""


SMALLEST: Final = 1e-33
"""Magnitude that some activation of a block must exceed; other blocks are rounded to zero."""


def multiply_reference(qtensor: QTensor, x: Tensor, arithmetic: Arithmetic) -> Tensor:
    """``x @ W.T`` for one matrix, see `quantine.kernels.matrix`.

    Args:
        qtensor: the packed weight ``W`` ``[out, in]``.
        x: ``[batch, in]`` float32, in the order of the model's inputs.
        arithmetic: ``"exact"`` or ``"fast"``.

    Returns:
        ``[batch, out]`` float32.
    """
    if arithmetic == "exact":
        return x @ qtensor.dequantize().T
    stored = x if qtensor.in_perm is None else x[:, qtensor.in_perm]
    grid, kept = qtensor.grid, qtensor.outliers
    centred = qtensor.codes - _of_weights(grid.zeros(), grid, qtensor.codes.shape)
    if kept is None:
        return _multiply_rounded(centred, grid, stored)
    # An outlier counts as the weight of its code plus a correction, which is multiplied with the
    # activations as they are. Where the grid has an exact zero, the code is set to mean that.
    places = kept.row_indices(), kept.columns
    if has_exact_zero(grid):
        centred[places] = 0.0
    scales = _of_weights(grid.scales(), grid, qtensor.codes.shape)
    added = torch.zeros_like(centred)
    added[places] = kept.values.float() - (centred * scales)[places]
    return _multiply_rounded(centred, grid, stored) + stored @ added.T


def multiply_grouped_reference(
    experts: Sequence[Sequence[QTensor]], x: Tensor, counts: Sequence[int], arithmetic: Arithmetic
) -> list[Tensor]:
    """Products of several experts, see `quantine.kernels.matrix.multiply_grouped`.

    Args:
        experts: for every expert its matrices ``[out, in]``.
        x: ``[rows, in]`` float32, the rows of one expert after those of another.
        counts: how many rows each expert has.
        arithmetic: ``"exact"`` or ``"fast"``.

    Returns:
        ``[rows, out]`` float32 for each place in the lists of matrices.
    """
    parts = x.split(list(counts))
    return [
        torch.cat(
            [multiply_reference(q, part, arithmetic) for q, part in zip(same, parts, strict=True)]
        )
        for same in zip(*experts, strict=True)
    ]


def has_exact_zero(grid: Grid) -> bool:
    """Whether some code stands for exactly zero, because zero points are whole numbers."""
    zero = grid.zero_point
    return zero is None or (isinstance(zero, Tensor) and zero.dtype == torch.uint8)


def _of_weights(statistics: Tensor, grid: Grid, shape: torch.Size) -> Tensor:
    """Scales or zero points ``[lines, groups]`` repeated for every weight of a group.

    Returns:
        A tensor of the matrix's ``shape`` ``[out, in]``, columns in stored order.
    """
    along_inputs = grid.axis == "in"
    lengths = grid.lengths(shape[1] if along_inputs else shape[0])
    repeats = torch.tensor(lengths, dtype=torch.int64, device=statistics.device)
    spread = statistics.repeat_interleave(repeats, 1)
    return spread if along_inputs else spread.T


def _multiply_rounded(centred: Tensor, grid: Grid, stored: Tensor) -> Tensor:
    """The product of rounded activations with the weights ``centred * scale``.

    Args:
        centred: ``[out, in]`` float32, codes minus zero points.
        grid: the weights' grid, which has the scales.
        stored: ``[batch, in]`` float32 activations, in stored column order.
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
    """Activations after rounding to 16 bits, with one scale for each block of at most `BLOCK`.

    Args:
        x: ``[batch, in]`` float32, in stored column order; the result has its shape.
        groups: sizes of the groups of columns, which blocks do not cross.
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
