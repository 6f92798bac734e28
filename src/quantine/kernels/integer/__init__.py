"""Integer products of packed weights with quantized activations (RPTQ, arXiv 2304.01089).

`quantine.kernels.integer.reference` has the formula. The native kernels sum
``(c_w - o_w) * c_x``, with ``c_w`` and ``c_x`` the codes of weight and activation and ``o_w`` the
whole number nearest to the zero point ``z_w`` for which ``c_w - o_w`` fits a byte with a sign.
Their integer sums are as exact; the float operations on these round differently.

On NVIDIA's GPUs the programs of `quantine.kernels.integer.triton` compute; see docs/gpu.md. A
`GriddedMatrix` holds a matrix and the grid of its inputs as they read them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.kernels import backend
from quantine.kernels.integer import cpu
from quantine.kernels.integer.input_grid import InputGrid
from quantine.kernels.integer.units import gridded_matrix as units
from quantine.kernels.integer.units.gridded_matrix import GriddedMatrix
from quantine.kernels.integer.units.inputs import InputUnits, Rounded
from quantine.kernels.matrix.cpu import Matrix


def multiplies_integers(qtensor: QTensor) -> bool:
    """Whether the native kernels multiply the packed matrix ``qtensor`` in integers.

    Its groups must run along inputs and be short enough for 32 bits to hold their sums, and the
    processor must have instructions for integer products: without them floats are faster.
    """
    return backend.of(qtensor.codes) == "native" and cpu.multiplies_integers(qtensor)


def native_grid(grid: InputGrid) -> Any:
    """``grid`` as a ``quantine._native.InputGrid``, which `multiply` takes.

    Raises:
        BackendUnavailable: the grid's tensors are not on the CPU, or the native extension is
            missing.
    """
    if grid.scale is not None:
        backend.check_native(grid.scale, grid.zero, grid.reach)
    return cpu.native_grid(grid)


def levels() -> list[str]:
    """Names of the instruction sets this processor has for `multiply`, the fastest first.

    All compute bit-identical results. The list is empty without the native extension.
    """
    return [] if backend.native() is None else cpu.levels()


def multiply(matrix: Matrix, grid: Any, x: Tensor, level: str | None = None) -> Tensor:
    """``x @ W.T`` with the inputs ``x`` rounded to their grid.

    Args:
        matrix: a native matrix ``W`` ``[out, in]`` for which `multiplies_integers` holds.
        grid: the inputs' grid, from `native_grid`.
        x: ``[batch, in]`` float32, contiguous.
        level: one of `levels`; ``None`` is the fastest.

    Returns:
        ``[batch, out]`` float32. A row is NaN where the row of ``x`` holds NaN, or where each
        token has a grid of its own and the range of ``x`` is not finite.

    Raises:
        BackendUnavailable: ``x`` is not on the CPU.
    """
    backend.check_native(x)
    return cpu.multiply(matrix, grid, x, level or levels()[0])


def input_codes(matrix: Matrix, grid: Any, x: Tensor) -> Tensor:
    """The codes of the inputs ``x`` that `multiply` multiplies, for tests.

    Args:
        matrix, grid, x: as for `multiply`.

    Returns:
        ``[batch, in]`` uint8, in the order in which the matrix stores its columns.

    Raises:
        BackendUnavailable: ``x`` is not on the CPU.
    """
    backend.check_native(x)
    return cpu.input_codes(matrix, grid, x)


def gridded_matrix(qtensor: QTensor, grid: InputGrid) -> GriddedMatrix | None:
    """``qtensor`` and the grid of its inputs as a GPU multiplies them in integers.

    ``None`` where there is no GPU with programs for it, or groups run along outputs.

    Raises:
        BackendUnavailable: the tensors are on several devices.
    """
    on = backend.of(qtensor.codes, grid.scale, grid.zero, grid.reach)
    return units.gridded_matrix(qtensor, grid) if on == "triton" else None


def multiply_gridded(matrix: GriddedMatrix, x: Tensor) -> Tensor:
    """``x @ W.T`` with the inputs ``x`` normed and rounded as ``matrix.inputs`` says.

    Args:
        matrix: from `gridded_matrix`.
        x: ``[batch, in]`` float32, float16 or bfloat16, on the device of ``matrix``.

    Returns:
        ``[batch, out]`` in the dtype of ``x``; rows are NaN where `multiply` has them so.
    """
    return multiply_rounded(matrix, rounded(x, matrix.inputs), x.dtype)


def rounded(x: Tensor, inputs: InputUnits) -> Rounded:
    """The inputs ``x`` as `multiply_rounded` takes them; ``x`` as for `multiply_gridded`.

    Args:
        x: the inputs.
        inputs: of a `GriddedMatrix`, or what its method ``after`` made of them, which puts the norm
            before a matrix into the same pass. Matrices whose inputs are equal share the result.
    """
    from quantine.kernels.integer.triton.product import rounded as round_rows

    return round_rows(x, inputs)


def normed_and_rounded(x: Tensor, inputs: InputUnits) -> tuple[Tensor, Rounded]:
    """What the norm before a matrix writes, and `rounded`, in one pass.

    Args:
        x: what the norm reads; as for `multiply_gridded`.
        inputs: what ``after`` made of the inputs of a `GriddedMatrix`; ``gathered`` before it lets
            the norm write its channels in an order.

    Returns:
        What the norm writes, of the shape and dtype of ``x``, and the codes of it.
    """
    from quantine.kernels.integer.triton.product import normed_and_rounded as norm_rows

    return norm_rows(x, inputs)


def multiply_rounded(matrix: GriddedMatrix, x: Rounded, dtype: torch.dtype) -> Tensor:
    """``x @ W.T`` ``[batch, out]`` in ``dtype`` with inputs from `rounded`."""
    from quantine.kernels.integer.triton.product import multiply_rounded as multiply_rows

    return multiply_rows(matrix, x, dtype)
