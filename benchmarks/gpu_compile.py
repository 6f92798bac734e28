"""Compiles the programs for GPUs without having one, and says what the compiler made of them.

    python benchmarks/gpu_compile.py [--capability 9.0] [--json FILE]

For each program: registers of a thread, bytes that registers were spilled to, shared memory, loads
of 16 bytes, barriers, and instructions of tensor cores. docs/gpu.md has the table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # interpreted programs leave nothing to compile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpu_loops import FITS, LOOPS
from integer_programs import INTEGERS
from kv_programs import KV_PROGRAMS
from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.kernels.matrix.triton import few_rows, many_rows
from quantine.kernels.matrix.units.activations import arrange_reference, rows_reference
from quantine.kernels.matrix.units.unit_matrix import unit_matrix

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
"""Settings that are Triton's, not a program's own."""
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
    def weights(self) -> str:
        """How the matrix is packed, in words."""
        statistics = ", SpQR's statistics" if self.coded else ""
        outliers = ", 1% outliers" if self.outliers else ""
        along = "outputs" if self.axis == "out" else "inputs"
        return f"{self.bits} bits, groups of {self.group_size} {along}{statistics}{outliers}"

    @property
    def name(self) -> str:
        rows = f"{self.batch} row{'s' * (self.batch > 1)}"
        return f"{self.weights}; {self.columns} inputs, {rows}"


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
    byte_products: int
    logic: int
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


def launch_of(product: Any) -> tuple[Any, list[Any], dict[str, Any]]:
    if not isinstance(product, Product):
        return product.launch()
    matrix = unit_matrix(qtensor_of(product))
    assert matrix is not None
    x = torch.randn(product.batch, product.columns)
    result = torch.empty(product.batch, ROWS, dtype=torch.float16)
    if product.batch <= few_rows.FEW:
        return few_rows.launch_of(matrix, arrange_reference(x, matrix), result)
    return many_rows.launch_of(matrix, rows_reference(x, matrix), result)


def compiled(product: Any, capability: str) -> Outcome:
    program, operands, settings = launch_of(product)
    options = {name: settings.pop(name) for name in OPTIONS if name in settings}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    known: dict[tuple[int], Any] = {}
    for place, (name, value) in enumerate(zip(program.arg_names, operands, strict=False)):
        # As the launcher does, unless a program says that a number changes all the time.
        whole = isinstance(value, int) and not program.params[place].do_not_specialize
        if value is None or (whole and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, int | float):
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            if whole and value % 16 == 0:
                known[(place,)] = [["tt.divisibility", 16]]
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
        len(re.findall(r"\bdp4a|\b(?:w?g?mma\S*\.s8\.s8)", text)),
        len(re.findall(r"\b(?:and|or|xor|not|lop3|shl|shr)\.[bsu]32", text)),
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
    for product in (*PRODUCTS, *INTEGERS, *KV_PROGRAMS, *LOOPS, *FITS):
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
