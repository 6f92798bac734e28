"""Products of packed matrices on a GPU beside those of cuBLAS in float16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import integer_programs
from gpu_graphs import copies, on_device, replayed
from integer_programs import IntegerProduct
from matrix_programs import Product, qtensor_of
from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.kernels.integer.units.gridded_matrix import GriddedMatrix, gridded_matrix
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix, unit_matrix

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 4096), (128256, 4096))
"""Outputs and inputs of the matrices."""
KINDS = (
    Product(4, 128, "in", 0, False, False, 1),
    Product(3, 128, "in", 0, False, False, 1),
    Product(5, 128, "in", 0, False, False, 1),
    Product(8, 128, "in", 0, False, False, 1),
    Product(3, 16, "in", 0, True, False, 1),
    Product(3, 16, "in", 0, True, True, 1),
    Product(4, 16, "in", 0, True, False, 1),
    Product(4, 16, "in", 0, True, True, 1),
    Product(4, 128, "in", 0, False, True, 1),
    Product(4, 64, "out", 0, False, False, 1),
    Product(3, 64, "out", 0, False, True, 1),
)
"""Kinds of packed matrices, which get their inputs and rows of activations below."""
BATCHES = (1, 4, 16, 256, 1024)
"""Rows of activations."""
INTEGERS = (IntegerProduct(4, 128, 4096, 1), IntegerProduct(4, 0, 4096, 1))
"""Kinds of integer products, of weights of 4 bits with activations of 8, rounding included."""
INTEGER_OUTPUTS = 14336
"""Outputs of their matrices."""
INTEGER_BATCHES = (1, 4, 16, 256, 2048)


def timed_products() -> list[dict[str, Any]]:
    """A row for each shape, kind of matrix and number of rows of activations."""
    return [row for shape in SHAPES for row in timed_shape(shape)]


def timed_shape(shape: tuple[int, int]) -> list[dict[str, Any]]:
    """A row for each kind of matrix and number of rows of activations."""
    outputs, inputs = shape
    floats = copies(lambda: torch.randn(outputs, inputs, dtype=torch.float16, device="cuda"))
    times = {batch: microseconds(torch.matmul, [w.T for w in floats], batch) for batch in BATCHES}
    del floats
    return [row for kind in KINDS for row in timed_kind(kind, shape, times)]


def timed_kind(
    kind: Product, shape: tuple[int, int], float16: dict[int, float]
) -> list[dict[str, Any]]:
    """Microseconds of products of one kind beside those of cuBLAS, by rows of activations."""
    from quantine.kernels.matrix.triton.product import multiply

    outputs, inputs = shape
    matrices = copies(lambda: packed(replace(kind, columns=inputs), outputs))
    moved = sum(tensor.nbytes for tensor in matrices[0].parts()[0] if tensor is not None)
    rows = []
    for batch in BATCHES:
        spent = microseconds(lambda x, matrix: multiply(matrix, x), matrices, batch)
        name = replace(kind, columns=inputs, batch=batch).name
        rows.append(row_of(name, outputs, spent, float16[batch], moved))
    return rows


def timed_integers() -> list[dict[str, Any]]:
    """Microseconds of integer products beside those of cuBLAS in float16, by tokens."""
    from quantine.kernels.integer import multiply_gridded

    columns = INTEGERS[0].columns
    floats = copies(
        lambda: torch.randn(INTEGER_OUTPUTS, columns, dtype=torch.float16, device="cuda")
    )
    transposed = [w.T for w in floats]
    float16 = {batch: microseconds(torch.matmul, transposed, batch) for batch in INTEGER_BATCHES}
    del floats, transposed
    rows = []
    for kind in INTEGERS:
        matrices = copies(partial(gridded, kind))
        moved = sum(tensor.nbytes for tensor in matrices[0].parts()[0] if tensor is not None)
        for batch in INTEGER_BATCHES:
            spent = microseconds(lambda x, matrix: multiply_gridded(matrix, x), matrices, batch)
            name = replace(kind, batch=batch).name
            rows.append(row_of(name, INTEGER_OUTPUTS, spent, float16[batch], moved))
    return rows


def row_of(kind: str, outputs: int, spent: float, float16: float, moved: int) -> dict[str, Any]:
    """A product's microseconds, and those of cuBLAS in float16."""
    row = {
        "kind": kind,
        "outputs": outputs,
        "microseconds": round(spent, 2),
        "float16_microseconds": round(float16, 2),
        "times_float16": round(float16 / spent, 2),
        "gigabytes_per_second": round(moved / spent / 1e3, 1),
    }
    print(row, flush=True)
    return row


def microseconds(multiply: Callable[[Tensor, Any], Any], matrices: list[Any], batch: int) -> float:
    """Microseconds of one product with ``batch`` rows of activations."""
    x = torch.randn(batch, columns_of(matrices[0]), dtype=torch.float16, device="cuda")
    return replayed([partial(multiply, x, matrix) for matrix in matrices])


def columns_of(matrix: UnitMatrix | GriddedMatrix | Tensor) -> int:
    """Number of inputs of a matrix; a float one is transposed."""
    if isinstance(matrix, Tensor):
        return len(matrix)
    return matrix.columns if isinstance(matrix, UnitMatrix) else matrix.inputs.columns


def gridded(product: IntegerProduct) -> GriddedMatrix:
    """A matrix of random codes and the grid of its inputs, on the GPU."""
    outputs = INTEGER_OUTPUTS
    q = integer_programs.qtensor_of(product.bits, product.columns, product.group_size, outputs)
    matrix = gridded_matrix(on_device(q), on_device(integer_programs.grid_of(8, len(q.grid.sizes))))
    assert matrix is not None
    return matrix


def packed(product: Product, outputs: int) -> UnitMatrix:
    """A matrix of random codes on the GPU, with ``outputs`` rows."""
    part = qtensor_of(product)
    times = -(-outputs // len(part.codes))
    matrix = unit_matrix(on_device(repeated(part, times)))
    assert matrix is not None
    return matrix


def repeated(q: QTensor, times: int) -> QTensor:
    """``q`` with all its rows ``times`` times, one copy below the other."""

    def lines(stored: Any, along: int) -> Any:
        if isinstance(stored, Statistic):
            second = stored.grid
            grid = Grid(
                second.scale.repeat(1, times),
                second.zero_point.repeat(1, times),
                second.bits,
                second.group_size,
            )
            return Statistic(stored.codes.repeat(1, times), grid)
        return stored.repeat(*(times if axis == along else 1 for axis in (0, 1)))

    grid, along = q.grid, 0 if q.grid.axis == "in" else 1
    scale, zero = lines(grid.scale, along), lines(grid.zero_point, along)
    kept = q.outliers
    if kept is not None:
        mask = torch.zeros(q.codes.shape, dtype=torch.bool)
        mask[kept.row_indices(), kept.columns] = True
        values = torch.zeros(q.codes.shape)
        kept.replace_in(values)
        kept = Csr.where(mask.repeat(times, 1), values.repeat(times, 1))
    whole = Grid(scale, zero, grid.bits, grid.group_size, grid.axis)
    return QTensor(q.codes.repeat(times, 1), whole, outliers=kept)
