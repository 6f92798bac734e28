"""What GPUs allow: least times of products, from bytes, operations and instructions alone.

A product cannot be faster than the device reads its bytes, nor faster than it gives out its
instructions. Nothing here is measured. Rates are those of the makers' data sheets and, for
instructions, of the table of arithmetic throughput in NVIDIA's CUDA programming guide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from matrix_programs import ROWS, Product, qtensor_of
from quantine.core.activation_spec import UNQUANTIZED
from quantine.kernels.bits.reference import packed_bytes
from quantine.kernels.kv_attention.triton.request import FEWEST_ROWS
from quantine.kernels.matrix.units.instructions import unit_product
from quantine.kernels.matrix.units.layout import UNIT
from quantine.kernels.matrix.units.unit_matrix import unit_matrix

FLOAT16_BYTES = 2
KV_HEADS, COPIES, DIM = 8, 4, 128
"""Heads of keys, heads of queries to each, and channels: attention as Llama 3.1 8B has it."""


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
    """

    name: str
    bandwidth: float
    operations: float
    cores: int
    clock: float
    integer: int
    half_pairs: int


GPUS = (
    Gpu("A100 80 GB", 2.039e12, 312e12, 108, 1.41e9, 64, 128),
    Gpu("H100 SXM", 3.35e12, 989e12, 132, 1.83e9, 64, 128),
    Gpu("RTX 4090", 1.008e12, 165e12, 128, 2.52e9, 64, 64),
)
ISSUED = 128
"""Results of all kinds that one multiprocessor gives in a tick, at most."""


@dataclass(frozen=True)
class Work:
    """What one product takes.

    Attributes:
        nbytes: that are read and written: weights, activations, results.
        integer: instructions on integers, counted for each thread.
        half: instructions on two float16.
        operations: of tensor cores.
    """

    nbytes: float
    integer: float
    half: float
    operations: float


def packed(product: Product, outputs: int) -> Work:
    """A packed matrix of ``outputs`` rows times ``product.batch`` rows of activations."""
    matrix = unit_matrix(qtensor_of(replace(product, batch=1)))
    assert matrix is not None
    stored = sum(tensor.nbytes for tensor in matrix.parts()[0] if tensor is not None)
    units = outputs * product.columns / UNIT
    lines = [line.strip() for line in unit_product(product.bits)[0].splitlines()]
    integer = sum(line.startswith(("lop3", "shr", "shl")) for line in lines)
    half = sum("f16x2" in line for line in lines)
    return Work(
        stored * outputs / ROWS + vectors(product, outputs), units * integer, units * half, 0
    )


def float16(product: Product, outputs: int) -> Work:
    """The same product with the weights in float16, by tensor cores."""
    weights = outputs * product.columns
    return Work(
        weights * FLOAT16_BYTES + vectors(product, outputs), 0, 0, 2 * weights * product.batch
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
    return Work(nbytes, 2 * pairs, pairs, operations)


def token_bytes(bits: int) -> int:
    """Bytes of the keys and values of one token and head."""
    return 2 * packed_bytes(DIM, min(bits, 8)) * (FLOAT16_BYTES if bits == UNQUANTIZED else 1)


def seconds(work: Work, gpu: Gpu) -> float:
    """Least seconds of ``work`` on ``gpu``: the slowest of memory, instructions, tensor cores."""
    ticks = gpu.cores * gpu.clock
    return max(
        work.nbytes / gpu.bandwidth,
        work.integer / gpu.integer / ticks,
        work.half / gpu.half_pairs / ticks,
        (work.integer + work.half) / ISSUED / ticks,
        work.operations / gpu.operations,
    )
