"""Programs for integer products and the rounding before them, as gpu_compile.py compiles them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from quantine.core.grid import Grid
from quantine.core.qtensor import QTensor
from quantine.core.spec import CLUSTERS
from quantine.kernels.integer.input_grid import InputGrid
from quantine.kernels.integer.triton import few_rows, many_rows, rounding
from quantine.kernels.integer.units.gridded_matrix import gridded_matrix
from quantine.kernels.integer.units.inputs import InputUnits, Norm, round_reference

ROWS = 64
"""Outputs of the matrices: programs do not depend on how many there are."""
CLUSTERED = 32
"""Clusters of inputs, as many as RPTQ's default has after norms."""


def sizes_of(columns: int, group_size: int) -> tuple[int, ...]:
    """Sizes of groups of ``columns`` inputs; `CLUSTERS` are clusters of uneven sizes."""
    if group_size:
        return (group_size,) * (columns // group_size)
    mean = columns // CLUSTERED
    sizes = [mean // 4 + mean * (number % 7) // 4 - number % 5 for number in range(CLUSTERED - 1)]
    return (*sizes, columns - sum(sizes))


def qtensor_of(bits: int, columns: int, group_size: int, rows: int = ROWS) -> QTensor:
    """Random codes with whole zero points, and inputs in an order of their own."""
    generator = torch.Generator().manual_seed(0)
    sizes = sizes_of(columns, group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (rows, len(sizes)), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, len(sizes), generator=generator).half()
    order = torch.randperm(columns, generator=generator)
    return QTensor(codes, Grid(scale, zero, bits, CLUSTERS, sizes=sizes), order)


def grid_of(bits: int, groups: int, factors: bool = False) -> InputGrid:
    """A static grid for each group, with factors of tokens or without."""
    middle = torch.full((groups,), 2.0 ** (bits - 1))
    return InputGrid(bits, torch.ones(groups), middle, torch.ones(1) if factors else None)


def groups_in_words(group_size: int) -> str:
    return f"groups of {group_size} inputs" if group_size else f"{CLUSTERED} clusters of inputs"


def tokens_in_words(count: int) -> str:
    return f"{count} token{'s' * (count > 1)}"


@dataclass(frozen=True)
class IntegerProduct:
    """An integer product to compile: bits, groups (0 is clusters), columns, tokens."""

    bits: int
    group_size: int
    columns: int
    batch: int

    @property
    def name(self) -> str:
        groups = groups_in_words(self.group_size)
        tokens = tokens_in_words(self.batch)
        return f"integers, {self.bits} bits, {groups}; {self.columns} inputs, {tokens}"

    def launch(self) -> tuple[Any, list[Any], dict[str, Any]]:
        qtensor = qtensor_of(self.bits, self.columns, self.group_size)
        matrix = gridded_matrix(qtensor, grid_of(8, len(qtensor.grid.sizes)))
        assert matrix is not None
        few = self.batch <= few_rows.FEW
        x = round_reference(torch.randn(self.batch, self.columns), matrix.inputs, few)
        result = torch.empty(self.batch, ROWS, dtype=torch.float16)
        return (few_rows if few else many_rows).launch_of(matrix, x, result)


@dataclass(frozen=True)
class Rounding:
    """Rounding to compile, of inputs of 32 clusters with factors of tokens.

    ``norm`` is the norm before it, which writes its result, too; ``""`` for none.
    """

    norm: str
    columns: int
    batch: int

    @property
    def name(self) -> str:
        before = f"{self.norm} and " if self.norm else ""
        return f"{before}rounding; {self.columns} inputs, {tokens_in_words(self.batch)}"

    def launch(self) -> tuple[Any, list[Any], dict[str, Any]]:
        sizes = sizes_of(self.columns, CLUSTERS)
        order = torch.randperm(self.columns)
        inputs = InputUnits.of(grid_of(8, len(sizes), True), sizes, None, order.device)
        if self.norm:
            weight = torch.ones(self.columns)
            bias = weight if self.norm == "LayerNorm" else None
            norm = Norm(weight, bias, 1e-5, bias is not None)
            inputs = inputs.gathered(order).after(norm)
        x = torch.randn(self.batch, self.columns).half()
        made = round_reference(x, inputs, self.batch <= few_rows.FEW)
        return rounding.launch_of(x, inputs, made, torch.empty_like(x) if self.norm else None)


INTEGERS = (
    IntegerProduct(4, 128, 4096, 1),
    IntegerProduct(3, 128, 4096, 1),
    IntegerProduct(8, 128, 4096, 1),
    IntegerProduct(4, CLUSTERS, 4096, 1),
    IntegerProduct(4, CLUSTERS, 14336, 1),
    IntegerProduct(4, 128, 4096, 4),
    IntegerProduct(4, CLUSTERS, 4096, 4),
    IntegerProduct(5, 128, 4096, 2),
    IntegerProduct(5, 128, 4096, 3),
    IntegerProduct(2, 128, 4096, 1),
    IntegerProduct(6, 128, 4096, 1),
    IntegerProduct(7, 128, 14336, 4),
    IntegerProduct(4, 128, 4096, 16),
    IntegerProduct(4, CLUSTERS, 4096, 16),
    IntegerProduct(4, 128, 4096, 256),
    IntegerProduct(4, CLUSTERS, 4096, 256),
    IntegerProduct(8, 128, 4096, 256),
    Rounding("", 4096, 1),
    Rounding("RMSNorm", 4096, 1),
    Rounding("LayerNorm", 4096, 256),
    Rounding("", 14336, 1),
    Rounding("", 28672, 1),
)
