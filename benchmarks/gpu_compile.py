"""Compiles the programs for GPUs without having one, and says what the compiler made of them.

    python benchmarks/gpu_compile.py [--capability 9.0] [--only NAME ...] [--json FILE]

For each program: registers of a thread, bytes that registers were spilled to, shared memory, loads
of 16 bytes, barriers, and instructions of tensor cores; of those for few rows also instructions for
32 codes. docs/gpu.md has the table, of what

    python benchmarks/gpu_compile.py --json benchmarks/results/compiled.json

wrote. What the file has of programs that are still the same is taken from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # interpreted programs leave nothing to compile
os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # what is cached may name the lines of another checkout

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpu_loops import FITS, LOOPS
from integer_programs import INTEGERS
from kv_programs import KV_PROGRAMS
from machine_code import Counts, Place, counts, loads_at, resources
from matrix_programs import MATRIX_PROGRAMS
from quantine.kernels.matrix.triton.programs.column_groups import multiply_column_groups
from quantine.kernels.matrix.triton.programs.column_groups_several import (
    multiply_column_groups_several,
)
from quantine.kernels.matrix.triton.programs.parts import codes_times, take_words
from quantine.kernels.matrix.triton.programs.row_groups import multiply_row_groups
from quantine.kernels.matrix.triton.programs.several import decode_pair, pair_times
from quantine.kernels.matrix.triton.warps import LANES

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
"""Settings that are Triton's, not a program's own."""
FOR_FEW_ROWS = (multiply_row_groups, multiply_column_groups, multiply_column_groups_several)
"""Programs whose instructions for 32 codes are counted."""
PRODUCTS = (codes_times, decode_pair, pair_times)
"""What decodes codes and multiplies them in these."""
PROGRAMS = (*MATRIX_PROGRAMS, *INTEGERS, *KV_PROGRAMS, *LOOPS, *FITS)
CAPABILITIES = ("8.0", "8.9", "9.0", "10.0")
TYPES = {
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}


@dataclass(frozen=True)
class Outcome:
    """What the compiler made of a program.

    ``key`` is Triton's hash of all that is compiled: equal keys, equal results. ``wide_code_loads``
    and ``code_loads`` are loads of words of codes: of 16 bytes, and all. In programs for few rows a
    thread has ``units`` of 32 codes, whose decoding and products are ``half`` instructions on two
    float16 and ``integer`` ones on integers; all of the program are ``instructions``. These are of
    the machine code; loops count once. Elsewhere all four are 0.
    """

    name: str
    key: str
    capability: str
    warps: int
    registers: int
    spilled: int
    shared: int
    wide_loads: int
    loads: int
    wide_code_loads: int
    code_loads: int
    barriers: int
    tensor_core: int
    byte_products: int
    logic: int
    local: int
    units: int
    half: int
    integer: int
    instructions: int


class Asked(NamedTuple):
    """What Triton is asked to compile, and with which of its own settings.

    ``units`` is how many units of codes a thread has, in programs for few rows; else 0.
    """

    source: ASTSource
    options: dict[str, Any]
    units: int

    @property
    def key(self) -> str:
        """The hash of both."""
        return hashlib.sha256(f"{self.source.hash()} {self.options}".encode()).hexdigest()[:16]


def asked(product: Any) -> Asked:
    """What is compiled of a program, as the launcher would ask for it."""
    program, operands, settings = product.launch()
    options = {name: settings.pop(name) for name in OPTIONS if name in settings}
    units = 0
    if program in FOR_FEW_ROWS:
        units = _rows_of(program, settings) * settings["WIDTH"] // (LANES * options["num_warps"])
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
    left_alone = {p.name: p.default for p in program.params if p.has_default}
    for name, value in (left_alone | settings).items():
        signature[name], constants[name] = "constexpr", value
    return Asked(ASTSource(program, signature, constants, known), options, units)


def _rows_of(program: Any, settings: dict[str, Any]) -> int:
    """Rows of the matrix that a program for few rows of activations multiplies."""
    return int(settings["ROWS" if program is multiply_column_groups else "BLOCK"])


def compiled(name: str, program: Asked, capability: str) -> Outcome:
    """What the compiler makes of a program for a compute capability."""
    target = GPUTarget("cuda", int(capability.replace(".", "")), 32)
    made = triton.compile(program.source, target=target, options=program.options)
    text = made.asm["ptx"]
    used = resources(made.asm["cubin"])
    counted = Counts(0, 0, 0)
    if program.units:
        counted = counts([Place.of(product) for product in PRODUCTS], made.asm["cubin"])
    return Outcome(
        name,
        program.key,
        capability,
        program.options["num_warps"],
        used["REG"],
        used["STACK"],
        made.metadata.shared,
        len(re.findall(r"ld\.global\S*\.v4|cp\.async\.cg", text)),
        len(re.findall(r"ld\.global|cp\.async\.c[ag]", text)),
        *loads_at(Place.of(take_words), text),
        len(re.findall(r"bar\.sync", text)),
        len(re.findall(r"\b(?:w?g?mma\S*\.sync|tcgen05\.mma)", text)),
        len(re.findall(r"\bdp4a|\b(?:w?g?mma\S*\.s8\.s8)", text)),
        len(re.findall(r"\b(?:and|or|xor|not|lop3|shl|shr)\.[bsu]32", text)),
        used["LOCAL"],
        program.units,
        counted.half,
        counted.integer,
        counted.all,
    )


def kept(path: Path | None) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What a file has that this version of Triton made, by name, key and capability."""
    if path is None or not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found["triton"] != triton.__version__:
        return {}
    return {(o["name"], o.get("key", ""), o["capability"]): o for o in found["programs"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", choices=CAPABILITIES, help="one only")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="programs of these names")
    parser.add_argument("--json", type=Path, help="write the outcomes here as well")
    arguments = parser.parse_args()
    chosen = [arguments.capability] if arguments.capability else CAPABILITIES
    before, outcomes = kept(arguments.json), []
    print(
        "| product | capability | registers | spilled | shared | wide loads | barriers | tensor |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for product in PROGRAMS:
        if arguments.only and product.name not in arguments.only:
            continue
        program = asked(product)
        for capability in chosen:
            o = before.get((product.name, program.key, capability))
            o = o or asdict(compiled(product.name, program, capability))
            outcomes.append(o)
            print(
                f"| {o['name']} | {capability} | {o['registers']} | {o['spilled']} | "
                f"{o['shared']} | {o['wide_loads']} of {o['loads']} | {o['barriers']} | "
                f"{o['tensor_core']} |",
                flush=True,
            )
    if arguments.json:
        found = {"triton": triton.__version__, "programs": outcomes}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
