"""`quantine.kernels.matrix` by the native extension: tensors are on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from quantine.core.arithmetic import Arithmetic
from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.kernels import backend
from quantine.kernels.threads import pool

TILE: Final = 16
"""Number of output rows of a tile, the unit of the native layout (docs/kernels.md)."""
PANEL_BYTES: Final = 2**24
"""Bytes of weights that are decoded at once for PyTorch to multiply. Fewer would cost time, as
PyTorch rearranges the activations for each product."""

Matrix = Any
"""The type ``quantine._native.Matrix``; the extension has no type stubs."""


def packed_matrix(qtensor: QTensor) -> Matrix:
    """The native matrix of ``qtensor``; see `quantine.kernels.matrix.packed_matrix`."""
    native, grid = backend.extension(), qtensor.grid
    outliers = None
    if qtensor.outliers is not None:
        values = qtensor.outliers.values
        half = values.dtype == torch.float16
        outliers = native.Outliers(
            qtensor.outliers.row_offsets,
            qtensor.outliers.columns,
            values.view(torch.int16) if half else None,
            None if half else values.float(),
        )
    return native.Matrix.packed(
        qtensor.codes.contiguous(),
        grid.bits,
        grid.group_size,
        grid.axis == "out",
        _statistic(grid.scale, grid.exponent),
        _statistic(grid.zero_point),
        None if qtensor.in_perm is None else qtensor.in_perm.long(),
        outliers,
        pool(),
        torch.tensor(grid.sizes, dtype=torch.int64, device="cpu") if grid.sizes else None,
    )


def float_matrix(weight: Tensor) -> Matrix:
    """See `quantine.kernels.matrix.float_matrix`; where ``weight`` is is not checked."""
    native, half = backend.extension(), weight.half()
    if torch.equal(half.to(weight.dtype), weight):
        return native.Matrix.from_half(half.contiguous().view(torch.int16), pool())
    return native.Matrix.from_float(weight.float().contiguous(), pool())


def _statistic(stored: Tensor | Statistic | None, exponent: int = 0) -> Any:
    """The native form of scales or zero points, which are ``2**exponent`` times ``stored``."""
    native = backend.extension()
    if stored is None:
        return native.Statistic()
    if isinstance(stored, Statistic):
        second: Grid = stored.grid
        return native.Statistic(
            codes=stored.codes.contiguous(),
            steps=_half_bits(second.scale),
            zeros=_half_bits(second.zero_point),
            bits=second.bits,
            span=second.group_size,
            exponent=exponent,
        )
    if stored.dtype == torch.uint8:
        return native.Statistic(codes=stored.contiguous())
    return native.Statistic(halves=_half_bits(stored), exponent=exponent)


def _half_bits(stored: Tensor | Statistic | None) -> Tensor:
    assert isinstance(stored, Tensor)
    return stored.contiguous().view(torch.int16)


def multiply(matrices: Sequence[Matrix], x: Tensor, arithmetic: Arithmetic) -> list[Tensor]:
    """See `quantine.kernels.matrix.multiply`."""
    results = [x.new_empty(len(x), matrix.rows) for matrix in matrices]
    exact = arithmetic == "exact"
    backend.extension().multiply(list(matrices), x, results, exact, pool())
    return results


def multiply_grouped(
    experts: Sequence[Sequence[Matrix]], x: Tensor, counts: Sequence[int], arithmetic: Arithmetic
) -> list[Tensor]:
    """See `quantine.kernels.matrix.multiply_grouped`."""
    results = [x.new_empty(len(x), matrix.rows) for matrix in experts[0]]
    each = [list(matrices) for matrices in experts]
    exact = arithmetic == "exact"
    backend.extension().multiply_grouped(each, x, list(counts), results, exact, pool())
    return results


def multiply_panels(matrix: Matrix, x: Tensor, arithmetic: Arithmetic) -> Tensor:
    """See `quantine.kernels.matrix.multiply_panels`."""
    rounds = arithmetic == "fast" and x.dtype == torch.float32
    if rounds and backend.extension().has_bfloat16():
        return multiply_panels(matrix, x.bfloat16(), arithmetic).float()
    result = x.new_empty(len(x), matrix.rows)
    height = max(TILE, PANEL_BYTES // (matrix.columns * x.element_size()) // TILE * TILE)
    for first in range(0, matrix.rows, height):
        shape = (min(height, matrix.rows - first), matrix.columns)
        if x.dtype == torch.bfloat16:
            panel = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
            matrix.decode_bfloat16(first, panel.view(torch.int16), pool())
        else:
            panel = torch.empty(shape, dtype=torch.float32, device=x.device)
            matrix.decode(first, panel, pool())
            panel = panel.to(x.dtype)
        torch.mm(x, panel.T, out=result[:, first : first + len(panel)])
    return result


def read_words(words: Tensor) -> int:
    """See `quantine.kernels.matrix.read_words`."""
    return int(backend.extension().read_words(words, pool()))
