"""Products with packed matrices: the native kernels, and the PyTorch meaning of them.

A native `Matrix` holds the tensors of a `QTensor` in the order in which the kernels read them; see
docs/kernels.md. There are two kinds of arithmetic. ``exact``: weights are decoded in registers, and
products are summed in float32. ``fast``: activations are rounded to 16 bits first, one scale for
each block of at most `BLOCK` inputs, which never crosses a group of weights. Where groups run along
outputs, what is rounded is each activation times the scale of its input, once for each group.
"""

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

BLOCK: Final = 64
"""Inputs that share a scale of rounded activations, at most."""
TILE: Final = 16
"""Output rows of a tile."""
PANEL_BYTES: Final = 2**24
"""Decoded weights that are multiplied at once where there are many rows. PyTorch rearranges the
activations each time."""
LARGEST_CODE: Final = 127 * 256 + 127
"""Of activations: high and low part both fit 8 bits with a sign."""
SMALLEST: Final = 1e-33
"""Blocks of activations that do not reach this are rounded to zero."""

Matrix = Any
"""``quantine._native.Matrix``; the extension has no type stubs."""


def packed_matrix(qtensor: QTensor) -> Matrix | None:
    """The native matrix of ``qtensor``; ``None`` without the extension, or off the CPU.

    ``None`` also where groups run along outputs and are neither multiples of `TILE` rows nor all
    rows: tiles would cross them.
    """
    native = backend.native() if qtensor.codes.device.type == "cpu" else None
    grid, rows = qtensor.grid, len(qtensor.codes)
    crossed = grid.axis == "out" and grid.group_size % TILE != 0 and grid.group_size < rows
    if native is None or crossed:
        return None
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
        _statistic(native, grid.scale),
        _statistic(native, grid.zero_point),
        None if qtensor.in_perm is None else qtensor.in_perm.long(),
        outliers,
        pool(),
        torch.tensor(grid.sizes) if grid.sizes else None,
    )


def float_matrix(weight: Tensor) -> Matrix | None:
    """The native matrix of a float ``weight`` ``[out, in]``, in 16 bit if that loses nothing."""
    native = backend.native() if weight.device.type == "cpu" else None
    if native is None:
        return None
    half = weight.half()
    if torch.equal(half.to(weight.dtype), weight):
        return native.Matrix.from_half(half.contiguous().view(torch.int16), pool())
    return native.Matrix.from_float(weight.float().contiguous(), pool())


def _statistic(native: Any, stored: Tensor | Statistic | None) -> Any:
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
        )
    if stored.dtype == torch.uint8:
        return native.Statistic(codes=stored.contiguous())
    return native.Statistic(halves=_half_bits(stored))


def _half_bits(stored: Tensor | Statistic | None) -> Tensor:
    assert isinstance(stored, Tensor)
    return stored.contiguous().view(torch.int16)


def multiply(matrices: Sequence[Matrix], x: Tensor, arithmetic: Arithmetic) -> list[Tensor]:
    """``x @ W.T`` for each of ``matrices``, whose inputs are the same; one parallel step.

    Args:
        matrices: native ones, ``[out, in]``.
        x: ``[batch, in]`` float32, contiguous.
        arithmetic: see the module.

    Returns:
        ``[batch, out]`` float32 each.
    """
    native = backend.native()
    assert native is not None
    results = [x.new_empty(len(x), matrix.rows) for matrix in matrices]
    native.multiply(list(matrices), x, results, arithmetic == "exact", pool())
    return results


def read_words(words: Tensor) -> int:
    """The sum of ``words`` ``[n]`` int64 modulo 2**64: reads memory as fast as it comes."""
    native = backend.native()
    assert native is not None
    return int(native.read_words(words, pool()))


def multiply_panels(matrix: Matrix, x: Tensor, arithmetic: Arithmetic) -> Tensor:
    """``x @ W.T`` by PyTorch, weights decoded part by part: for many rows of ``x``.

    ``fast`` rounds float32 to bfloat16 where the processor multiplies that; docs/kernels.md says
    what it costs.

    Args:
        x: ``[batch, in]`` float32, bfloat16 or float16; the weights are rounded to its dtype.

    Returns:
        ``[batch, out]`` in the dtype of ``x``.
    """
    native = backend.native()
    assert native is not None
    if arithmetic == "fast" and x.dtype == torch.float32 and native.has_bfloat16():
        return multiply_panels(matrix, x.bfloat16(), arithmetic).float()
    result = x.new_empty(len(x), matrix.rows)
    height = max(TILE, PANEL_BYTES // (matrix.columns * x.element_size()) // TILE * TILE)
    for first in range(0, matrix.rows, height):
        shape = (min(height, matrix.rows - first), matrix.columns)
        if x.dtype == torch.bfloat16:
            panel = torch.empty(shape, dtype=torch.bfloat16)
            matrix.decode_bfloat16(first, panel.view(torch.int16), pool())
        else:
            panel = torch.empty(shape)
            matrix.decode(first, panel, pool())
            panel = panel.to(x.dtype)
        torch.mm(x, panel.T, out=result[:, first : first + len(panel)])
    return result


def multiply_reference(qtensor: QTensor, x: Tensor, arithmetic: Arithmetic) -> Tensor:
    """The meaning of `multiply` for one matrix."""
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
    lengths = torch.tensor(grid.lengths(shape[1] if along_inputs else shape[0]))
    spread = statistics.repeat_interleave(lengths, 1)
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
