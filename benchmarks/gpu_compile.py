"""Compiles the programs for GPUs without having one, and says what the compiler made of them.

    python benchmarks/gpu_compile.py [--capability 9.0] [--json FILE]

For each product, column loop and fit: registers of a thread, bytes that registers were spilled to,
shared memory, loads of 16 bytes, barriers, and instructions of tensor cores. docs/gpu.md
has the table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # which would leave nothing to compile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.core.spec import QuantSpec
from quantine.kernels.columns.columns import AtReach, Columns
from quantine.kernels.columns.triton import columns as column_loop
from quantine.kernels.columns.triton.programs.block import round_block
from quantine.kernels.fit.fitted import FittedGroups
from quantine.kernels.fit.grid_cost import GridCost
from quantine.kernels.fit.triton import groups as matrix_fit
from quantine.kernels.fit.triton.programs.matrix import fit_matrix
from quantine.kernels.fit.triton.request import Share, run_of
from quantine.kernels.matrix.triton import few_rows, many_rows
from quantine.kernels.matrix.units.activations import arrange_reference, rows_reference
from quantine.kernels.matrix.units.unit_matrix import unit_matrix

CAPABILITIES = ("8.0", "8.9", "9.0", "10.0")
ROWS = 64
"""Outputs of the matrices: programs do not depend on how many there are."""
TYPES = {
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
}


@dataclass(frozen=True)
class Product:
    """A product to compile: bits, groups, columns, statistics, outliers, rows of activations."""

    bits: int
    group_size: int
    axis: str
    columns: int
    coded: bool
    outliers: bool
    batch: int

    @property
    def name(self) -> str:
        statistics = ", SpQR's statistics" if self.coded else ""
        outliers = ", 1% outliers" if self.outliers else ""
        along = "outputs" if self.axis == "out" else "inputs"
        return (
            f"{self.bits} bits, groups of {self.group_size} {along}{statistics}{outliers}; "
            f"{self.columns} inputs, {self.batch} row{'s' * (self.batch > 1)}"
        )


PRODUCTS = (
    Product(4, 128, "in", 4096, False, False, 1),
    Product(3, 128, "in", 4096, False, False, 1),
    Product(5, 128, "in", 4096, False, False, 1),
    Product(8, 128, "in", 4096, False, False, 1),
    Product(3, 16, "in", 4096, True, False, 1),
    Product(3, 16, "in", 4096, True, True, 1),
    Product(4, 128, "in", 14336, False, False, 1),
    Product(3, 16, "in", 14336, True, True, 1),
    Product(3, 16, "in", 28672, True, True, 1),
    Product(4, 64, "out", 4096, False, False, 1),
    Product(4, 64, "out", 28672, False, True, 1),
    Product(4, 128, "in", 4096, False, False, 4),
    Product(4, 128, "in", 4096, False, False, 16),
    Product(4, 128, "in", 4096, False, False, 64),
    Product(3, 16, "in", 4096, True, True, 16),
    Product(4, 64, "out", 4096, False, False, 16),
)


@dataclass(frozen=True)
class Loop:
    """A block of the column loop to compile: the groups that are fitted in it, and outliers.

    ``length`` is 0 where grids are known before the loop.
    """

    spec: QuantSpec
    cost: GridCost
    length: int

    @property
    def name(self) -> str:
        spec = self.spec
        if not self.length:
            return f"column loop, {spec.bits} bits, known grids"
        statistics = f", second grids of {spec.stat_group_size} rows" if spec.second_level else ""
        outliers = ", outliers" if self.cost.price < math.inf else ""
        return (
            f"column loop, {spec.bits} bits, groups of {self.length} {spec.group_axis}puts "
            f"by {self.cost.clip}{statistics}{outliers}"
        )


SPQR = GridCost("hessian", 0.5, look_ahead=True)
LOOPS = (
    Loop(QuantSpec(4), GridCost("mse"), 0),
    Loop(QuantSpec(4, 128), GridCost("mse"), 128),
    Loop(QuantSpec(3, 16, scale_bits=3), SPQR, 16),
    Loop(QuantSpec(4, 16, scale_bits=3, stat_group_size=64), SPQR, 16),
    Loop(QuantSpec(3, 16, scale_bits=3, zero_bits=3), GridCost("minmax", 0.2, True), 16),
    Loop(QuantSpec(3, 64, scale_bits=4), SPQR, 64),
    Loop(QuantSpec(3, 64, scale_bits=3, group_axis="out"), SPQR, 64),
)


@dataclass(frozen=True)
class Fit:
    """A fit to compile of all groups of a matrix, which do not change."""

    spec: QuantSpec
    cost: GridCost

    @property
    def name(self) -> str:
        spec = self.spec
        return f"fit, {spec.bits} bits, groups of {spec.group_size} inputs by {self.cost.clip}"


FITS = (Fit(QuantSpec(4), GridCost("mse")), Fit(QuantSpec(4, 128), GridCost("minmax")))


@dataclass(frozen=True)
class Outcome:
    """What the compiler made of a program."""

    name: str
    capability: str
    warps: int
    registers: int
    spilled: int
    shared: int
    wide_loads: int
    loads: int
    barriers: int
    tensor_core: int
    local: int


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


def launch_of(product: Product | Loop | Fit) -> tuple[Any, list[Any], dict[str, Any]]:
    if isinstance(product, Loop):
        return loop_launch_of(product)
    if isinstance(product, Fit):
        return fit_launch_of(product)
    matrix = unit_matrix(qtensor_of(product))
    assert matrix is not None
    x = torch.randn(product.batch, product.columns)
    result = torch.empty(product.batch, ROWS, dtype=torch.float16)
    if product.batch <= few_rows.FEW:
        return few_rows.launch_of(matrix, arrange_reference(x, matrix), result)
    return many_rows.launch_of(matrix, rows_reference(x, matrix), result)


def loop_launch_of(loop: Loop) -> tuple[Any, list[Any], dict[str, Any]]:
    rows, inputs, device = 256, 256, torch.device("cpu")
    spec, fitting, upper = loop.spec, None, torch.eye(inputs)
    groups = torch.zeros(inputs, dtype=torch.int64)
    if loop.length:
        if spec.group_axis == "out":
            second = Grid(torch.ones(inputs, rows // loop.length), torch.zeros(1, 1), 3, 1)
            fitted = FittedGroups.of_columns(inputs, rows, spec, (second, None), device)
        else:
            fitted = FittedGroups.empty(inputs // loop.length, rows, loop.length, spec, device)
        fitting = AtReach(fitted, upper.diagonal().clone(), loop.cost)
    weight, values = torch.zeros(rows, inputs), (torch.ones(1, rows), torch.zeros(1, rows))
    columns = Columns.of(weight, upper, groups, spec.bits, values, groups, loop.cost.price, fitting)
    _, operands, settings = column_loop.launch_of(columns, 0, 128, fitting)
    return round_block, operands, settings


def fit_launch_of(fit: Fit) -> tuple[Any, list[Any], dict[str, Any]]:
    length, device = fit.spec.group_size, torch.device("cpu")
    groups = torch.zeros(ROWS, 4 * length).T.unflatten(0, (4, length))
    fitted = FittedGroups.empty(4, ROWS, length, fit.spec, device)
    share = Share.of(run_of(fit.spec, fitted.run), length)
    assert share is not None
    spread = torch.ones(4, length)
    _, operands, settings = matrix_fit.launch_of(groups, spread, fitted, fit.cost, share)
    return fit_matrix, operands, settings


def compiled(product: Product | Loop | Fit, capability: str) -> Outcome:
    program, operands, settings = launch_of(product)
    options = {name: settings.pop(name) for name in ("num_warps", "num_stages") if name in settings}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    known: dict[tuple[int], Any] = {}
    for place, (name, value) in enumerate(zip(program.arg_names, operands, strict=False)):
        if value is None:
            signature[name], constants[name] = "constexpr", None
        elif isinstance(value, int | float):
            signature[name] = "i32" if isinstance(value, int) else "fp32"
        else:
            signature[name] = TYPES[value.dtype]
            known[(place,)] = [["tt.divisibility", 16]]
    for name, value in settings.items():
        signature[name], constants[name] = "constexpr", value
    target = GPUTarget("cuda", int(capability.replace(".", "")), 32)
    source = ASTSource(program, signature, constants, known)
    made = triton.compile(source, target=target, options=options)
    text = made.asm["ptx"]
    used = resources(made.asm["cubin"])
    return Outcome(
        product.name,
        capability,
        options["num_warps"],
        used["REG"],
        used["STACK"],
        made.metadata.shared,
        len(re.findall(r"ld\.global\S*\.v4|cp\.async\.cg", text)),
        len(re.findall(r"ld\.global|cp\.async\.c[ag]", text)),
        len(re.findall(r"bar\.sync", text)),
        len(re.findall(r"\b(?:w?g?mma\S*\.sync|tcgen05\.mma)", text)),
        used["LOCAL"],
    )


def resources(cubin: bytes) -> dict[str, int]:
    """What a thread uses, as NVIDIA's tool says that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", choices=CAPABILITIES, help="one only")
    parser.add_argument("--json", type=Path, help="write the outcomes here as well")
    arguments = parser.parse_args()
    outcomes = []
    chosen = [arguments.capability] if arguments.capability else CAPABILITIES
    print(
        "| product | capability | registers | spilled | shared | wide loads | barriers | tensor |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for product in (*PRODUCTS, *LOOPS, *FITS):
        for capability in chosen:
            o = compiled(product, capability)
            outcomes.append(asdict(o))
            print(
                f"| {o.name} | {o.capability} | {o.registers} | {o.spilled} | {o.shared} | "
                f"{o.wide_loads} of {o.loads} | {o.barriers} | {o.tensor_core} |",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(outcomes, indent=1) + "\n")


if __name__ == "__main__":
    main()
