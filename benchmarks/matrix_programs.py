"""Programs of packed matrices, as benchmarks/gpu_compile.py compiles them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.kernels.matrix.triton import arrange, experts, few_rows, many_rows
from quantine.kernels.matrix.units.activations import arrange_reference, rows_reference
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix, unit_matrix
from quantine.kernels.matrix.units.unit_stack import stacked

ROWS = 128
"""Outputs of the matrices: programs do not depend on how many there are."""


@dataclass(frozen=True)
class Product:
    """A product to compile: bits, groups, columns, statistics, outliers, rows of activations, and
    the dtype of its result."""

    bits: int
    group_size: int
    axis: str
    columns: int
    coded: bool
    outliers: bool
    batch: int
    dtype: torch.dtype = torch.float16

    @property
    def weights(self) -> str:
        """How the matrix is packed, in words."""
        statistics = ", SpQR's statistics" if self.coded else ""
        outliers = ", 1% outliers" if self.outliers else ""
        along = "outputs" if self.axis == "out" else "inputs"
        return f"{self.bits} bits, groups of {self.group_size} {along}{statistics}{outliers}"

    @property
    def name(self) -> str:
        rows = f"{self.batch} row{'s' * (self.batch > 1)}"
        kind = "" if self.dtype == torch.float16 else f", {str(self.dtype).removeprefix('torch.')}"
        return f"{self.weights}; {self.columns} inputs{kind}, {rows}"

    def launch(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """The program, its operands in order, and what is fixed when it is compiled."""
        matrix = self.matrix()
        x = torch.randn(self.batch, self.columns)
        result = torch.empty(self.batch, ROWS, dtype=self.dtype)
        if self.batch <= few_rows.FEW:
            return few_rows.launch_of(matrix, arrange_reference(x, matrix), result, self.batch)
        return many_rows.launch_of(matrix, rows_reference(x, matrix), result)

    def matrix(self) -> UnitMatrix:
        """A random matrix of this kind, as GPUs hold it."""
        found = unit_matrix(qtensor_of(self))
        assert found is not None
        return found


@dataclass(frozen=True)
class Arrangement:
    """Activations brought into the order of the matrix of a product, to compile."""

    product: Product

    @property
    def name(self) -> str:
        return f"arranging for {self.product.name}"

    def launch(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """The program, its operands in order, and what is fixed when it is compiled."""
        product, matrix = self.product, self.product.matrix()
        x = torch.randn(product.batch, product.columns).to(product.dtype)
        if product.batch > few_rows.FEW:
            rows = rows_reference(x, matrix)
            return arrange.launch_of(x, matrix, rows.halves, rows.factors, None)
        found = arrange_reference(x, matrix)
        halves = found.words.view(torch.float16)
        return arrange.launch_of(x, matrix, halves, found.factors, found.sums)


@dataclass(frozen=True)
class Decoding:
    """The decoding of the whole matrix of a product, to compile."""

    product: Product

    @property
    def name(self) -> str:
        return f"decoding {self.product.name.partition(';')[0]}"

    def launch(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """The program, its operands in order, and what is fixed when it is compiled."""
        matrix = self.product.matrix()
        result = torch.empty(ROWS, matrix.columns, dtype=self.product.dtype)
        return many_rows.decoding_of(matrix, result, 0)


@dataclass(frozen=True)
class OfExperts:
    """A product whose rows have experts, each with a matrix of its kind, to compile."""

    product: Product

    @property
    def name(self) -> str:
        return f"experts, {self.product.name}"

    def launch(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """The program, its operands in order, and what is fixed when it is compiled."""
        product, matrix = self.product, self.product.matrix()
        (stack,) = stacked([matrix])
        x = torch.randn(product.batch, product.columns)
        result = torch.empty(product.batch, ROWS, dtype=product.dtype)
        numbers = torch.zeros(product.batch, dtype=torch.int64)
        if product.batch > few_rows.FEW:
            rows = rows_reference(x, matrix)
            return experts.many_launch_of(stack, experts.tiles_of(numbers, 1), rows, result)
        return experts.few_launch_of(stack, numbers.int(), arrange_reference(x, matrix), result)


@dataclass(frozen=True)
class OrderOfExperts:
    """Activations brought into the order that the matrix of their expert has, to compile."""

    product: Product

    @property
    def name(self) -> str:
        return f"experts, ordering for {self.product.weights}"

    def launch(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """The program, its operands in order, and what is fixed when it is compiled."""
        product = self.product
        matrix = replace(product.matrix(), source=torch.arange(product.columns).int())
        x = torch.randn(product.batch, product.columns).to(product.dtype)
        rows, places = rows_reference(x, matrix), torch.zeros(product.batch, dtype=torch.int32)
        return arrange.launch_of(x, matrix, rows.halves, rows.factors, None, places)


def qtensor_of(product: Product) -> QTensor:
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, product.columns)
    codes = torch.randint(0, 2**product.bits, shape, generator=generator, dtype=torch.uint8)
    lines, length = shape if product.axis == "in" else shape[::-1]
    groups = length // product.group_size
    scale: Any = torch.rand(lines, groups, generator=generator).half()
    zero: Any = torch.zeros(lines, groups, dtype=torch.uint8)
    if product.coded:
        second = Grid(
            torch.ones(groups, lines // 16).half(), torch.ones(groups, lines // 16).half(), 3, 16
        )
        scale = zero = Statistic(torch.zeros(groups, lines, dtype=torch.uint8), second)
    kept = None
    if product.outliers:
        mask = torch.rand(shape, generator=generator) < 0.01
        kept = Csr.where(mask, torch.randn(shape, generator=generator))
    axis: Any = product.axis
    return QTensor(codes, Grid(scale, zero, product.bits, product.group_size, axis), outliers=kept)


def kinds(columns: int, batch: int) -> tuple[Product, ...]:
    """All kinds of packed matrices: along inputs first, and what is used most before the rest.

    They are of 3, 4, 5 and 8 bits, in groups of 128, or of 16 with SpQR's statistics, with 1%
    outliers and without, along both axes.
    """
    return tuple(
        Product(bits, size, axis, columns, coded, outliers, batch)
        for axis in ("in", "out")
        for many in ((3, 4), (5, 8))
        for size, coded in ((128, False), (16, True))
        for outliers in (False, True)
        for bits in many
    )


MATRIX_PROGRAMS: tuple[Product | Arrangement | Decoding | OfExperts | OrderOfExperts, ...] = (
    *kinds(4096, 1),
    Product(4, 128, "in", 14336, False, False, 1),
    Product(3, 16, "in", 14336, True, True, 1),
    Product(3, 16, "in", 28672, True, True, 1),
    Product(4, 64, "out", 4096, False, False, 1),
    Product(8, 64, "out", 14336, False, True, 1),
    Product(4, 64, "out", 28672, False, True, 1),
    Product(4, 128, "in", 4096, False, False, 4),
    Product(3, 16, "in", 4096, True, True, 4),
    Product(4, 64, "out", 4096, False, False, 4),
    Product(3, 16, "out", 4096, True, True, 4),
    Product(4, 128, "in", 4096, False, False, 2),
    Product(8, 16, "in", 4096, True, True, 4),
    Product(5, 128, "in", 4096, False, False, 3),
    Product(7, 128, "in", 14336, False, False, 2),
    Product(3, 16, "in", 14336, True, True, 4),
    Product(8, 128, "out", 4096, False, True, 2),
    Product(4, 64, "out", 4096, False, False, 2),
    Product(6, 128, "out", 4096, False, False, 4),
    Product(5, 16, "out", 14336, True, True, 3),
    Product(8, 16, "out", 14336, True, True, 4),
    Product(4, 128, "in", 4096, False, False, 16),
    Product(4, 128, "in", 4096, False, False, 64),
    Product(3, 16, "in", 4096, True, True, 16),
    Product(8, 16, "in", 4096, True, True, 16),
    Product(3, 16, "in", 4096, True, True, 64),
    Product(4, 64, "out", 4096, False, False, 16),
    Product(4, 64, "out", 4096, False, False, 64),
    Product(2, 16, "in", 4096, True, True, 1),
    Product(6, 128, "in", 4096, False, False, 1),
    Product(7, 128, "in", 4096, False, True, 1),
    Product(2, 64, "out", 4096, False, False, 1),
    Product(6, 64, "out", 4096, False, True, 1),
    Product(7, 64, "out", 4096, False, False, 1),
    Product(2, 16, "in", 4096, True, True, 16),
    Product(6, 128, "in", 4096, False, False, 16),
    Product(7, 64, "out", 4096, False, False, 16),
    Product(4, 128, "in", 4096, False, False, 1, torch.bfloat16),
    Product(4, 128, "in", 4096, False, False, 64, torch.bfloat16),
    Arrangement(Product(4, 128, "in", 4096, False, False, 1)),
    Arrangement(Product(3, 16, "in", 14336, True, True, 1)),
    Arrangement(Product(4, 64, "out", 4096, False, False, 64, torch.bfloat16)),
    Decoding(Product(4, 128, "in", 4096, False, False, 0)),
    Decoding(Product(3, 16, "in", 4096, True, True, 0)),
    Decoding(Product(4, 64, "out", 4096, False, False, 0, torch.bfloat16)),
    OfExperts(Product(4, 128, "in", 4096, False, False, 1)),
    OfExperts(Product(3, 16, "in", 4096, True, True, 1)),
    OfExperts(Product(4, 64, "out", 4096, False, True, 1)),
    OfExperts(Product(4, 128, "in", 4096, False, False, 64)),
    OfExperts(Product(3, 16, "in", 4096, True, True, 16)),
    OfExperts(Product(4, 64, "out", 4096, False, False, 16)),
    OrderOfExperts(Product(4, 128, "in", 4096, False, False, 64)),
)
