"""Products in integers of packed weights with rounded activations (RPTQ, arXiv 2304.01089).

`multiply_reference` has the formula. The native kernels sum ``(c_w - o_w) * c_x``, where ``o_w`` is
the whole number next to the zero point ``z_w`` that leaves a byte with a sign; the sums are as
exact, and what floats then round differs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.kernels import backend
from quantine.kernels.integer import cpu
from quantine.kernels.integer.input_grid import InputGrid
from quantine.kernels.matrix.cpu import Matrix


def multiplies_integers(qtensor: QTensor) -> bool:
    """Whether the native kernels take ``qtensor``.

    Its groups must run along inputs, and be short enough for 32 bits to hold their sums. Without
    instructions for integers, floats are faster.
    """
    return backend.of(qtensor.codes) == "native" and cpu.multiplies_integers(qtensor)


def native_grid(grid: InputGrid) -> Any:
    """``quantine._native.InputGrid``, which `multiply` takes.

    Raises:
        BackendUnavailable: the grid is not on the CPU.
    """
    if grid.scale is not None:
        backend.check_native(grid.scale, grid.zero, grid.reach)
    return cpu.native_grid(grid)


def levels() -> list[str]:
    """Instruction sets for `multiply`, the best one first; all find the same bits."""
    return [] if backend.native() is None else cpu.levels()


def multiply(matrix: Matrix, grid: Any, x: Tensor, level: str | None = None) -> Tensor:
    """``x @ W.T`` with the inputs rounded to their grid.

    Rows of ``x`` with NaN, or with grids of their own and a range that is not finite, become NaN.

    Args:
        matrix: native, of which `multiplies_integers`.
        grid: from `native_grid`.
        x: ``[batch, in]`` float32, contiguous.
        level: one of `levels`, if not the best.

    Returns:
        ``[batch, out]`` float32.

    Raises:
        BackendUnavailable: ``x`` is not on the CPU.
    """
    backend.check_native(x)
    return cpu.multiply(matrix, grid, x, level or levels()[0])


def input_codes(matrix: Matrix, grid: Any, x: Tensor) -> Tensor:
    """The codes that `multiply` multiplies: ``[batch, in]`` uint8, in stored order.

    Raises:
        BackendUnavailable: ``x`` is not on the CPU.
    """
    backend.check_native(x)
    return cpu.input_codes(matrix, grid, x)
