"""Integer products as an operator of PyTorch, which graphs and compilers see as one.

Importing this module registers the operator ``quantine::multiply_rounded``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantine.kernels.integer.triton import few_rows, many_rows
from quantine.kernels.integer.triton.rounding import norm_and_round, round_inputs
from quantine.kernels.integer.units.gridded_matrix import GriddedMatrix
from quantine.kernels.integer.units.inputs import InputUnits, Rounded


def rounded(x: Tensor, inputs: InputUnits) -> Rounded:
    """``x`` normed and rounded, in the form that products of so many rows read.

    Args:
        x: ``[batch, columns]`` float32, float16 or bfloat16.
        inputs: how it is normed and rounded.
    """
    return round_inputs(x, inputs, len(x) <= few_rows.FEW)


def normed_and_rounded(x: Tensor, inputs: InputUnits) -> tuple[Tensor, Rounded]:
    """What the norm of ``inputs`` makes of ``x``, ``[batch, columns]``, and `rounded`."""
    return norm_and_round(x, inputs, len(x) <= few_rows.FEW)


def multiply_rounded(matrix: GriddedMatrix, x: Rounded, dtype: torch.dtype) -> Tensor:
    """The product with activations that are rounded already, ``[batch, out]`` in ``dtype``.

    Args:
        matrix: the matrix.
        x: from `rounded`, for this matrix or one with the same inputs.
        dtype: of the result.
    """
    result: Tensor = _multiply(x.codes, x.sums, x.scale, x.shift, *matrix.parts(), dtype)
    return result


@torch.library.custom_op("quantine::multiply_rounded", mutates_args=())
def _multiply(
    codes: Tensor,
    sums: Tensor,
    scale: Tensor,
    shift: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    matrix, x = GriddedMatrix.of_parts(tensors, numbers, eps), Rounded(codes, sums, scale, shift)
    if len(codes) == 0:
        return codes.new_empty(0, matrix.rows, dtype=dtype)
    if codes.dim() == 3:
        return few_rows.multiply(matrix, x, dtype)
    return many_rows.multiply(matrix, x, dtype)


@_multiply.register_fake
def _shape(
    codes: Tensor,
    sums: Tensor,
    scale: Tensor,
    shift: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    words = tensors[0]
    assert words is not None
    return codes.new_empty(codes.shape[0], words.shape[0], dtype=dtype)
