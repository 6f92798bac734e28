"""The product of packed matrices as an operator of PyTorch, which graphs and compilers see as one.

Importing this module registers the operator ``quantine::multiply_units``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantine.kernels.matrix.triton import few_rows, many_rows
from quantine.kernels.matrix.triton.arrange import arrange, arrange_rows
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix


def multiply(matrix: UnitMatrix, x: Tensor) -> Tensor:
    """``x @ W.T``, as precise as `few_rows` or `many_rows` say.

    Args:
        matrix: the matrix ``W`` ``[out, in]``.
        x: ``[batch, in]`` float32, float16 or bfloat16.

    Returns:
        ``[batch, out]`` in the dtype of ``x``.
    """
    result: Tensor = _multiply(x, *matrix.parts())
    return result


@torch.library.custom_op("quantine::multiply_units", mutates_args=())
def _multiply(
    x: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[int], multiplier: float
) -> Tensor:
    matrix, x = UnitMatrix.of_parts(tensors, numbers, multiplier), x.contiguous()
    if len(x) == 0:
        return x.new_empty(0, matrix.rows)
    if len(x) <= few_rows.FEW:
        return few_rows.multiply(matrix, arrange(x, matrix), x.dtype)
    return many_rows.multiply(matrix, arrange_rows(x, matrix), x.dtype)


@_multiply.register_fake
def _shape(
    x: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[int], multiplier: float
) -> Tensor:
    words = tensors[0]
    assert words is not None
    return x.new_empty(x.shape[0], words.shape[0])
