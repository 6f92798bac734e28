"""Products of packed weight matrices with float activations.

On NVIDIA's GPUs the programs of `quantine.kernels.matrix.triton` compute; see docs/gpu.md.

The native kernels read codes in an order of their own. A `Matrix` holds a copy of the tensors of a
`QTensor` in that order, made once; see docs/kernels.md.

There are two kinds of arithmetic. ``exact``: weights are decoded in registers, and products are
summed in float32. ``fast``: activations are rounded to 16 bits first, one scale for each block of
at most `quantine.kernels.matrix.reference.BLOCK` inputs, which never crosses a group of weights.
Where groups run along outputs, what is rounded is each activation times the scale of its input,
once for each group. `quantine.kernels.matrix.reference.multiply_reference` is the meaning of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from quantine.core.arithmetic import Arithmetic
from quantine.core.grid import Statistic
from quantine.core.qtensor import QTensor
from quantine.kernels import backend
from quantine.kernels.matrix import cpu
from quantine.kernels.matrix.cpu import Matrix
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix, unit_matrix
from quantine.kernels.matrix.units.unit_stack import UnitStack

FEW_ROWS: Final = 64
"""Largest number of rows of activations that native kernels multiply straight with the codes."""
TILED_ROWS: Final = 255
"""Likewise on GPUs; for more, panels of the matrix are decoded, and PyTorch multiplies."""


def packed_matrix(qtensor: QTensor) -> Matrix | UnitMatrix | None:
    """``qtensor`` as the kernels of its device read it, or ``None`` where there can be none.

    There is none on the CPU without the native extension, nor for grids with minima or statistics
    along a line. On GPUs there is none where scales are negative, and else `unit_matrix` says what
    there can be. Elsewhere there is nothing.
    """
    scale = qtensor.grid.scale
    along_line = isinstance(scale, Statistic) and scale.grid.axis == "out"
    if along_line or qtensor.grid.minimum is not None:
        return None
    kind = backend.of(qtensor.codes)
    if kind == "triton":
        signed = isinstance(scale, Tensor) and bool((scale < 0).any())
        return None if signed else unit_matrix(qtensor)
    return cpu.packed_matrix(qtensor) if kind == "native" else None


def product(matrix: Matrix | UnitMatrix, x: Tensor, arithmetic: Arithmetic) -> Tensor:
    """``x @ W.T`` by whichever way is fastest for the number of rows of ``x``.

    Args:
        matrix: what `packed_matrix` made of ``W`` ``[out, in]``, on the device of ``x``.
        x: ``[batch, in]`` float32, bfloat16 or float16.
        arithmetic: of products on the CPU, see the module; those on GPUs are of float16.

    Returns:
        ``[batch, out]`` in the dtype of ``x``.
    """
    if isinstance(matrix, UnitMatrix):
        from quantine.kernels.matrix.triton.many_rows import multiply_decoded
        from quantine.kernels.matrix.triton.product import multiply as multiply_units

        if len(x) > TILED_ROWS:
            return multiply_decoded(matrix, x)
        return multiply_units(matrix, x)
    if len(x) > FEW_ROWS:
        return multiply_panels(matrix, x, arithmetic)
    return multiply([matrix], x.float().contiguous(), arithmetic)[0].to(x.dtype)


def rows_of(matrix: UnitMatrix, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a matrix that a GPU's programs read, which has no outliers, decoded.

    Args:
        matrix: the matrix, on a GPU of NVIDIA.
        rows: ``[n]`` int64 on its device.
        dtype: of the result; weights are rounded to float16 on the way, as where many rows of
            activations meet them.

    Returns:
        ``[n, in]``, columns in the order of inputs.
    """
    from quantine.kernels.matrix.triton.many_rows import decode

    return decode(matrix.of_rows(rows), dtype)


def experts_product(
    stacks: Sequence[UnitStack], x: Tensor, experts: Tensor, ordered: bool
) -> Tensor:
    """Each row of ``x`` times the matrix of its expert, on a GPU; the host waits for nothing.

    Args:
        stacks: the matrices ``[out, in]`` of all experts, from `stacked`.
        x: ``[rows, in]`` float32, bfloat16 or float16, at least one row.
        experts: ``[rows]`` int64, the number of each row's expert.
        ordered: whether they rise, so that rows of an expert are multiplied together; else each
            reads its matrix alone, which is faster where hardly two rows have one expert.

    Returns:
        ``[rows, out]`` in the dtype of ``x``.
    """
    from quantine.kernels.matrix.triton.experts import multiply_sorted, multiply_unsorted

    multiply_rows = multiply_sorted if ordered else multiply_unsorted
    return multiply_rows(stacks, x.contiguous(), experts)


def grouped_product(
    experts: Sequence[Sequence[Matrix]], x: Tensor, counts: Sequence[int], arithmetic: Arithmetic
) -> list[Tensor]:
    """`multiply_grouped` by whichever way is fastest for the rows of each expert, as `product`.

    Experts with few rows are multiplied together, each of the others alone.

    Args:
        experts, counts, arithmetic: as for `multiply_grouped`.
        x: ``[rows, in]`` float32, bfloat16 or float16.

    Returns:
        The results in the dtype of ``x``.
    """
    if max(counts) <= FEW_ROWS:
        found = multiply_grouped(experts, x.float().contiguous(), counts, arithmetic)
        return [result.to(x.dtype) for result in found]
    parts = x.split(list(counts))
    few = [number for number, count in enumerate(counts) if count <= FEW_ROWS]
    results: dict[int, Sequence[Tensor]] = {}
    if few:
        rows, sizes = torch.cat([parts[n] for n in few]), [counts[n] for n in few]
        together = grouped_product([experts[n] for n in few], rows, sizes, arithmetic)
        each = zip(*(result.split(sizes) for result in together), strict=True)
        results.update(zip(few, each, strict=True))
    for number, (matrices, part) in enumerate(zip(experts, parts, strict=True)):
        if number not in results:
            results[number] = [product(matrix, part, arithmetic) for matrix in matrices]
    in_order = [results[number] for number in range(len(counts))]
    return [torch.cat(same) for same in zip(*in_order, strict=True)]


def float_matrix(weight: Tensor) -> Matrix | None:
    """The native matrix of a float weight, or ``None`` without the extension or off the CPU.

    Args:
        weight: ``[out, in]`` of any float dtype; held as float16 if that represents every value
            exactly, else as float32.
    """
    return cpu.float_matrix(weight) if backend.of(weight) == "native" else None


def multiply(matrices: Sequence[Matrix], x: Tensor, arithmetic: Arithmetic) -> list[Tensor]:
    """``x @ W.T`` for several matrices ``W`` that have the same inputs, all in one parallel step.

    Args:
        matrices: native matrices ``[out, in]``.
        x: ``[batch, in]`` float32, contiguous.
        arithmetic: ``"exact"`` or ``"fast"``, see the module.

    Returns:
        ``[batch, out]`` float32 for each matrix.

    Raises:
        BackendUnavailable: ``x`` is not on the CPU.
    """
    backend.check_native(x)
    return cpu.multiply(matrices, x, arithmetic)


def multiply_grouped(
    experts: Sequence[Sequence[Matrix]], x: Tensor, counts: Sequence[int], arithmetic: Arithmetic
) -> list[Tensor]:
    """``x @ W.T`` for matrices of several experts, each with rows of its own, in one parallel step.

    Only matrices of experts with rows are read. What is computed is that of `multiply`; see
    `quantine.kernels.matrix.reference.multiply_grouped_reference`.

    Args:
        experts: native matrices ``[out, in]``, equally many of each expert; those in one place are
            of one shape.
        x: ``[rows, in]`` float32, contiguous: rows of the first expert, of the second, and so on.
        counts: how many rows each expert has.
        arithmetic: ``"exact"`` or ``"fast"``, see the module.

    Returns:
        ``[rows, out]`` float32: of the first matrix of every expert, of the second, and so on.

    Raises:
        BackendUnavailable: ``x`` is not on the CPU.
    """
    backend.check_native(x)
    return cpu.multiply_grouped(experts, x, counts, arithmetic)


def multiply_panels(matrix: Matrix, x: Tensor, arithmetic: Arithmetic) -> Tensor:
    """``x @ W.T`` for many rows of ``x``: weights are decoded part by part, PyTorch multiplies.

    Args:
        matrix: a native matrix ``W`` ``[out, in]``.
        x: ``[batch, in]`` float32, bfloat16 or float16; the weights are rounded to its dtype.
        arithmetic: ``"fast"`` rounds float32 activations and weights to bfloat16 where the
            processor multiplies that (docs/kernels.md has the loss); ``"exact"`` does not.

    Returns:
        ``[batch, out]`` in the dtype of ``x``.

    Raises:
        BackendUnavailable: ``x`` is not on the CPU.
    """
    backend.check_native(x)
    return cpu.multiply_panels(matrix, x, arithmetic)


def read_words(words: Tensor) -> int:
    """Sum all ``words`` ``[n]`` int64 modulo 2**64, to measure how fast memory can be read.

    Raises:
        BackendUnavailable: ``words`` are not on the CPU.
    """
    backend.check_native(words)
    return cpu.read_words(words)
