"""What GPUs allow: least times of programs, from bytes, operations and instructions alone.

A program cannot be faster than the device reads its bytes, nor faster than it gives out its
instructions. Nothing here is measured. Rates are those of the makers' data sheets and, for
instructions, of the table of arithmetic throughput in NVIDIA's CUDA programming guide. Instructions
of programs for few rows are those that the compiler made, in benchmarks/results/compiled.json; of
others they are what their texts or formulas take at least.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import integer_programs
from integer_programs import IntegerProduct
from matrix_programs import ROWS, Product
from quantine.core.activation_spec import UNQUANTIZED
from quantine.kernels.bits.reference import packed_bytes
from quantine.kernels.integer.triton import few_rows as few_tokens
from quantine.kernels.integer.units.gridded_matrix import gridded_matrix
from quantine.kernels.integer.units.layout import QUADS
from quantine.kernels.kv_attention.triton.request import FEWEST_ROWS
from quantine.kernels.matrix import TILED_ROWS
from quantine.kernels.matrix.triton.few_rows import FEW
from quantine.kernels.matrix.triton.many_rows import MOST
from quantine.kernels.matrix.triton.warps import LANES, warps_of
from quantine.kernels.matrix.units.instructions import unit_codes
from quantine.kernels.matrix.units.layout import TOGETHER, UNIT

FLOAT16_BYTES = 2
KV_HEADS, COPIES, DIM = 8, 4, 128
"""Heads of keys, heads of queries to each, and channels: attention as Llama 3.1 8B has it."""
COMPILED = Path(__file__).parent / "results" / "compiled.json"
INPUTS = 4096
"""Inputs of the programs that stand for those of other lengths, which were not compiled."""
DIVISION = 8
"""Instructions of a division that is rounded as IEEE says, at least."""
NORMED = 2 * DIVISION + 7
"""Instructions for a value that is normed and rounded: its square, norm and weight, divisions by
the token's factor and by the scale, zero point, rounding, two bounds."""
ROUNDED = DIVISION + 6
"""The same of a key or value: a division, zero point, rounding, two bounds, its place in a word."""

Compiled = dict[tuple[str, str], dict[str, Any]]
"""What the compiler made of programs, by name and compute capability."""


@dataclass(frozen=True)
class Gpu:
    """A device's rates.

    Attributes:
        bandwidth: bytes that its memory gives in a second.
        operations: of its tensor cores in a second, float16 with sums in float32 (a product and a
            sum are two).
        cores: streaming multiprocessors.
        clock: ticks of these in a second.
        integer: results of 32-bit logic that one multiprocessor gives in a tick.
        half_pairs: the same of fused multiplications of two float16.
        byte_operations: of its tensor cores in a second, on bytes.
        capability: compute capability that programs are compiled for.
    """

    name: str
    bandwidth: float
    operations: float
    cores: int
    clock: float
    integer: int
    half_pairs: int
    byte_operations: float
    capability: str


GPUS = (
    Gpu("A100 80 GB", 2.039e12, 312e12, 108, 1.41e9, 64, 128, 624e12, "8.0"),
    Gpu("H100 SXM", 3.35e12, 989e12, 132, 1.83e9, 64, 128, 1979e12, "9.0"),
    Gpu("RTX 4090", 1.008e12, 165e12, 128, 2.52e9, 64, 64, 660e12, "8.9"),
)
ISSUED = 128
"""Results of all kinds that one multiprocessor gives in a tick, at most."""


@dataclass(frozen=True)
class Work:
    """What one launch takes.

    Attributes:
        nbytes: that are read and written: weights, activations, results.
        instructions: all that are counted, for each thread.
        integer: those of them that are known to be of 32-bit logic, or products of four bytes.
        half: those that are known to be on two float16.
        operations: of tensor cores on float16.
        byte_operations: the same on bytes.
    """

    nbytes: float
    instructions: float = 0
    integer: float = 0
    half: float = 0
    operations: float = 0
    byte_operations: float = 0


def compiled() -> Compiled:
    """What benchmarks/results/compiled.json has."""
    found = json.loads(COMPILED.read_text())["programs"]
    return {(row["name"], row["capability"]): row for row in found}


def packed(product: Product, outputs: int, capability: str, known: Compiled) -> tuple[Work, ...]:
    """Launches of a packed matrix of ``outputs`` rows times ``product.batch`` rows of activations.

    As the runtime multiplies them: by the program for few rows, by tiles, or, for many, by decoding
    the matrix to float16 and a product of floats.
    """
    if product.batch <= FEW:
        return (few_rows(product, outputs, capability, known),)
    turns = -(-product.batch // MOST) if product.batch <= TILED_ROWS else 1
    lines = [line.strip() for line in unit_codes(product.bits)[0].splitlines()]
    integer = sum(line.startswith(("lop3", "shr", "shl")) for line in lines)
    half = sum("f16x2" in line for line in lines)
    units = turns * outputs * product.columns / UNIT
    decoding = Work(
        stored(product, outputs), units * (integer + half), units * integer, units * half
    )
    floats = float16(product, outputs)
    if product.batch > TILED_ROWS:
        written = outputs * product.columns * FLOAT16_BYTES
        return replace(decoding, nbytes=decoding.nbytes + written), floats
    nbytes = decoding.nbytes + vectors(product, outputs)
    return (replace(decoding, nbytes=nbytes, operations=floats.operations),)


def few_rows(product: Product, outputs: int, capability: str, known: Compiled) -> Work:
    """The launch of the program for few rows, which takes codes out once for all of them.

    All of its instructions count, loops over outliers as one turn, also those of threads that have
    no units where a row has too few.
    """
    row = known.get((product.name, capability))
    row = row or known[replace(product, columns=INPUTS).name, capability]
    units = product.columns // UNIT
    tile = warps_of(units) * LANES * TOGETHER
    threads = outputs * -(-units // tile) * tile / row["units"]
    return Work(
        stored(product, outputs) + vectors(product, outputs),
        threads * row["instructions"],
        threads * row["integer"],
        threads * row["half"],
    )


def stored(product: Product, outputs: int) -> float:
    """Bytes of the packed matrix."""
    parts = replace(product, batch=1).matrix().parts()[0]
    return sum(tensor.nbytes for tensor in parts if tensor is not None) * outputs / ROWS


def float16(product: Product, outputs: int) -> Work:
    """The same product with the weights in float16, by tensor cores."""
    weights = outputs * product.columns
    return Work(
        weights * FLOAT16_BYTES + vectors(product, outputs), operations=2 * weights * product.batch
    )


def vectors(product: Product, outputs: int) -> int:
    """Bytes of the activations and of the results."""
    return product.batch * (product.columns + outputs) * FLOAT16_BYTES


def attention(bits: int, context: int) -> Work:
    """One query of `KV_HEADS` heads of keys and `COPIES` times as many of queries, in one layer.

    A mask and a shift take two codes out, one subtraction centres both. 16 bits are floats.
    """
    codes = 2 * KV_HEADS * DIM * context
    nbytes = KV_HEADS * context * token_bytes(bits)
    operations = 2 * codes * FEWEST_ROWS
    pairs = 0 if bits == UNQUANTIZED else codes / 2
    return Work(nbytes, 3 * pairs, 2 * pairs, pairs, operations)


def token_bytes(bits: int) -> int:
    """Bytes of the keys and values of one token and head."""
    return 2 * packed_bytes(DIM, min(bits, 8)) * (FLOAT16_BYTES if bits == UNQUANTIZED else 1)


def integers(product: IntegerProduct, outputs: int, capability: str, known: Compiled) -> Work:
    """Codes of weights times codes of activations, which are bytes whatever their bits.

    Of few tokens products of four bytes and 32-bit logic count, of more only tensor cores.
    """
    q = integer_programs.qtensor_of(product.bits, product.columns, product.group_size)
    matrix = gridded_matrix(q, integer_programs.grid_of(8, len(q.grid.sizes)))
    assert matrix is not None
    parts = (matrix.words, matrix.scale, matrix.zero, matrix.base)
    of_rows = sum(part.nbytes for part in parts if part is not None)
    weights = outputs * product.columns
    nbytes = of_rows * outputs / integer_programs.ROWS
    nbytes += product.batch * (product.columns + outputs * FLOAT16_BYTES)
    if product.batch > few_tokens.FEW:
        return Work(nbytes, byte_operations=2 * weights * product.batch)
    row = known[product.name, capability]
    units = weights / UNIT * product.batch
    integer = units * QUADS * (1 + row["logic"] / row["byte_products"])
    return Work(nbytes, integer, integer)


def norming(inputs: int, tokens: int) -> Work:
    """Norm and rounding to bytes, the norm's result written, too."""
    values = inputs * tokens
    return Work(values * (2 * FLOAT16_BYTES + 1 + 4 / UNIT), values * NORMED)


def packing(bits: int, tokens: int) -> Work:
    """Keys and values of new tokens into the packed cache of one layer."""
    values = 2 * KV_HEADS * DIM * tokens
    nbytes = values * FLOAT16_BYTES + KV_HEADS * tokens * token_bytes(bits)
    return Work(nbytes, values * ROUNDED)


def seconds(launches: Iterable[Work], gpu: Gpu) -> float:
    """Least seconds of ``launches`` on ``gpu``, one after another.

    Of each it is the slowest of memory, instructions, tensor cores.
    """
    ticks = gpu.cores * gpu.clock
    return sum(
        max(
            work.nbytes / gpu.bandwidth,
            work.integer / gpu.integer / ticks,
            work.half / gpu.half_pairs / ticks,
            work.instructions / ISSUED / ticks,
            work.operations / gpu.operations + work.byte_operations / gpu.byte_operations,
        )
        for work in launches
    )
