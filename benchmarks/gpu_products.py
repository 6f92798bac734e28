"""Products of packed matrices on a GPU beside those of cuBLAS in float16.

Each function takes the GPU, the time that it may take, and sizes, so tests run them in the
interpreter, on little ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import integer_programs
from allowance import Allowance
from gpu_graphs import Gpu, bytes_of, copies, moved, replayed, speeds
from integer_programs import IntegerProduct
from matrix_programs import Product, kinds, qtensor_of
from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.kernels.integer.reference import multiply_reference
from quantine.kernels.integer.units.gridded_matrix import GriddedMatrix, gridded_matrix
from quantine.kernels.matrix import TILED_ROWS, product
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix, unit_matrix

SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096), (28672, 4096), (128256, 4096))
"""Outputs and inputs of the matrices, those first that marks are set for."""
KINDS = kinds(4096, 1)
"""Kinds of packed matrices, which get their inputs and rows of activations below."""
TOGETHER = 8
"""Kinds that are timed in every shape before the next ones are in any."""
BATCHES = (1, 4, 16, 256, 1024)
"""Rows of activations."""
BOTH = 256
"""Rows of activations from which tiles and decoded matrices are both timed."""
FARTHEST = 5e-3
"""Share of the largest output from which on a difference from the exact product is a failure:
sums of float16 are off by a tenth of it."""
INTEGERS = (IntegerProduct(4, 128, 4096, 1), IntegerProduct(4, 0, 4096, 1))
"""Kinds of integer products, of weights of 4 bits with activations of 8, rounding included."""
INTEGER_OUTPUTS = 14336
"""Outputs of their matrices."""
CHECKED = 64
"""Outputs of theirs that are compared with the reference."""
INTEGER_BATCHES = (1, 4, 16, 256, 2048)

Floats = dict[tuple[int, int], dict[int, float]]
"""Microseconds of cuBLAS by outputs and inputs, and by rows of activations."""
Way = Callable[[UnitMatrix, Tensor], Tensor]
"""A function that multiplies a packed matrix with rows of activations."""


def timed_products(
    gpu: Gpu,
    allowance: Allowance,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    asked: Sequence[Product] = KINDS,
    batches: Sequence[int] = BATCHES,
) -> list[dict[str, Any]]:
    """A row for each shape, kind of matrix, number of rows of activations and way to multiply."""
    rows: list[dict[str, Any]] = []
    floats: Floats = {}
    for first in range(0, len(asked), TOGETHER):
        for outputs, inputs in shapes:
            for kind in asked[first : first + TOGETHER]:
                name, exact = f"{outputs} x {inputs}: {kind.weights}", replace(kind, columns=inputs)
                rows += allowance.rows(
                    name, partial(timed_kind, gpu, exact, outputs, batches, floats, allowance)
                )
    return rows


def float16(gpu: Gpu, outputs: int, inputs: int, batches: Sequence[int]) -> dict[int, float]:
    """Microseconds of cuBLAS, by rows of activations."""
    weight = torch.randn(outputs, inputs, dtype=torch.float16, device=gpu.device)
    transposed = [each.T for each in copies(weight)]
    return {batch: microseconds(gpu, torch.matmul, transposed, batch) for batch in batches}


def timed_kind(
    gpu: Gpu,
    kind: Product,
    outputs: int,
    batches: Sequence[int],
    floats: Floats,
    allowance: Allowance,
) -> list[dict[str, Any]]:
    """Rows of products of one kind, by rows of activations.

    What the runtime does has ``chosen``; from `BOTH` rows on there is the other way beside it.
    Microseconds of cuBLAS in that shape are taken from ``floats``, or put there. A product more
    than `FARTHEST` from the one that PyTorch makes of decoded weights is noted as a failure of the
    allowance.
    """
    shape = (outputs, kind.columns)
    if shape not in floats:
        floats[shape] = float16(gpu, *shape, batches)
    part = moved(qtensor_of(kind), gpu.device)
    matrices, weight = copies(packed(part, outputs)), part.dequantize()
    rows = []
    for batch, slow in floats[shape].items():
        for by, multiply in ways(batch).items():
            spent = microseconds(gpu, partial(_swapped, multiply), matrices, batch)
            name = replace(kind, batch=batch).name
            row = {"kind": name, "outputs": outputs, "by": by, "chosen": by == chosen(batch)}
            row |= speeds(gpu, spent, slow, bytes_of(matrices[0]))
            x = activations(gpu, matrices[0], batch)
            compared(
                allowance,
                f"{outputs} outputs, {name}, {by}",
                multiply(matrices[0], x),
                x.float() @ weight.T,
            )
            print(row, flush=True)
            rows.append(row)
    return rows


def compared(allowance: Allowance, name: str, found: Tensor, exact: Tensor) -> None:
    """Note a product that is more than `FARTHEST` from the exact one as a failure.

    Args:
        allowance: where it is noted.
        name: of the product.
        found: ``[batch, times * outputs]``, of a matrix that has the same rows so many times.
        exact: ``[batch, outputs]`` float32.
    """
    apart = found.float().view(len(exact), -1, exact.shape[1]) - exact[:, None]
    off = float(apart.abs().max() / exact.abs().max())
    allowance.demand(off <= FARTHEST, f"{name}: off by {off:.2g} of the largest output")


def chosen(batch: int) -> str:
    """How the runtime multiplies so many rows of activations."""
    from quantine.kernels.matrix.triton.few_rows import FEW

    return "few rows" if batch <= FEW else "tiles" if batch <= TILED_ROWS else "decoded"


def ways(batch: int) -> dict[str, Way]:
    """Ways to multiply so many rows of activations, first the one that the runtime chooses."""
    from quantine.kernels.matrix.triton.many_rows import multiply_decoded
    from quantine.kernels.matrix.triton.product import multiply

    found: dict[str, Way] = {chosen(batch): lambda matrix, x: product(matrix, x, "exact")}
    if batch >= BOTH:
        others: dict[str, Way] = {"tiles": multiply, "decoded": multiply_decoded}
        found |= {by: way for by, way in others.items() if by not in found}
    return found


def _swapped(multiply: Way, x: Tensor, matrix: UnitMatrix) -> Tensor:
    return multiply(matrix, x)


def timed_integers(
    gpu: Gpu,
    allowance: Allowance,
    asked: Sequence[IntegerProduct] = INTEGERS,
    outputs: int = INTEGER_OUTPUTS,
    batches: Sequence[int] = INTEGER_BATCHES,
) -> list[dict[str, Any]]:
    """Integer products beside those of cuBLAS in float16: a row for each kind and tokens."""
    floats = float16(gpu, outputs, asked[0].columns, batches)
    rows: list[dict[str, Any]] = []
    for kind in asked:
        first, exact = gridded(kind, outputs, gpu.device)
        matrices = copies(first)
        for batch, slow in floats.items():
            of_batch = replace(kind, batch=batch)
            rows += allowance.rows(
                of_batch.name,
                partial(timed_integer, gpu, of_batch, matrices, exact, slow, allowance),
            )
    return rows


def timed_integer(
    gpu: Gpu,
    kind: IntegerProduct,
    matrices: list[GriddedMatrix],
    exact: Callable[[Tensor], Tensor],
    slow: float,
    allowance: Allowance,
) -> list[dict[str, Any]]:
    """The row of one kind and number of tokens; float16 takes ``slow`` microseconds.

    Its first outputs are compared with ``exact`` of the same activations.
    """
    from quantine.kernels.integer import multiply_gridded

    spent = microseconds(gpu, lambda x, matrix: multiply_gridded(matrix, x), matrices, kind.batch)
    row = {"kind": kind.name, "outputs": matrices[0].rows}
    row |= speeds(gpu, spent, slow, bytes_of(matrices[0]))
    x = activations(gpu, matrices[0], kind.batch)
    expected = exact(x.float())
    found = multiply_gridded(matrices[0], x)[:, : expected.shape[1]]
    compared(allowance, kind.name, found.contiguous(), expected)
    print(row, flush=True)
    return [row]


def microseconds(
    gpu: Gpu, multiply: Callable[[Tensor, Any], Any], matrices: list[Any], batch: int
) -> float:
    """Microseconds of one product with ``batch`` rows of activations."""
    x = activations(gpu, matrices[0], batch)
    return replayed(gpu, [partial(multiply, x, matrix) for matrix in matrices])


def activations(gpu: Gpu, matrix: UnitMatrix | GriddedMatrix | Tensor, batch: int) -> Tensor:
    """``batch`` rows of random inputs of ``matrix``, float16."""
    return torch.randn(batch, columns_of(matrix), dtype=torch.float16, device=gpu.device)


def columns_of(matrix: UnitMatrix | GriddedMatrix | Tensor) -> int:
    """Number of inputs of a matrix; a float one is transposed."""
    if isinstance(matrix, Tensor):
        return len(matrix)
    return matrix.columns if isinstance(matrix, UnitMatrix) else matrix.inputs.columns


def gridded(
    kind: IntegerProduct, outputs: int, device: str
) -> tuple[GriddedMatrix, Callable[[Tensor], Tensor]]:
    """A matrix of random codes and the grid of its inputs.

    With it comes what gives its first `CHECKED` outputs of activations in float32, by the
    reference.
    """
    q = moved(
        integer_programs.qtensor_of(kind.bits, kind.columns, kind.group_size, outputs), device
    )
    grid = moved(integer_programs.grid_of(8, len(q.grid.sizes)), device)
    matrix = gridded_matrix(q, grid)
    assert matrix is not None
    few = replace(q.grid, scale=q.grid.scale[:CHECKED], zero_point=q.grid.zero_point[:CHECKED])
    part = replace(q, codes=q.codes[:CHECKED], grid=few)
    return matrix, partial(multiply_reference, part, grid)


def packed(part: QTensor, outputs: int) -> UnitMatrix:
    """A matrix with the rows of ``part`` again and again, ``outputs`` or a few more."""
    matrix = unit_matrix(repeated(part, -(-outputs // len(part.codes))))
    assert matrix is not None
    return matrix


def repeated(q: QTensor, times: int) -> QTensor:
    """``q`` with all its rows ``times`` times, one copy below the other, on its device."""

    def lines(stored: Any, along: int) -> Any:
        if isinstance(stored, Statistic):
            second = stored.grid
            grid = Grid(
                second.scale.repeat(*_times(1 - along, times)),
                second.zero_point.repeat(*_times(1 - along, times)),
                second.bits,
                second.group_size,
            )
            return Statistic(stored.codes.repeat(*_times(1 - along, times)), grid)
        return stored.repeat(*_times(along, times))

    grid, along = q.grid, 0 if q.grid.axis == "in" else 1
    scale, zero = lines(grid.scale, along), lines(grid.zero_point, along)
    kept = q.outliers
    if kept is not None:
        mask = torch.zeros(q.codes.shape, dtype=torch.bool, device=q.codes.device)
        mask[kept.row_indices(), kept.columns] = True
        values = torch.zeros(q.codes.shape, device=q.codes.device)
        kept.replace_in(values)
        kept = Csr.where(mask.repeat(times, 1), values.repeat(times, 1))
    whole = Grid(scale, zero, grid.bits, grid.group_size, grid.axis)
    return QTensor(q.codes.repeat(times, 1), whole, outliers=kept)


def _times(along: int, times: int) -> tuple[int, int]:
    return (times, 1) if along == 0 else (1, times)
