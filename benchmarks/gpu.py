"""What a GPU of NVIDIA does with packed matrices: tests, times and a JSON, in one command.

    make gpu

Without a GPU it says what it would do. With one it runs the tests of the programs on it, quantizes
matrices, a block and the demo model on it and on the CPU (gpu_quantizing.py), and times products
against cuBLAS in float16, both in CUDA graphs that rotate through more matrices than the GPU's
cache holds. benchmarks/results/gpu-NAME.json keeps the outcome.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import integer_programs
from gpu_compile import Product, qtensor_of
from integer_programs import IntegerProduct
from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.kernels.integer.units.gridded_matrix import GriddedMatrix, gridded_matrix
from quantine.kernels.bits.reference import packed_bytes
from quantine.kernels.kv_attention import attend
from quantine.kernels.kv_attention.packed_states import PackedStates
from quantine.kernels.kv_attention.scoring import Scoring
import gpu_quantizing
from gpu_compile import Product, qtensor_of
from quantine import Calibration
from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.errors import CheckpointError
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix, unit_matrix
from roofline import COPIES, DIM, KV_HEADS

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/kernels/test_triton_matrix.py",
    "tests/kernels/test_triton_columns.py",
    "tests/kernels/test_triton_integer.py",
    "tests/kernels/test_triton_rounding.py",
)
    "tests/kernels/test_triton_packing.py",
    "tests/kernels/test_triton_attention.py",
)
CONTEXTS = (4096, 32768)
"""Tokens that one query of attention meets, of the heads that benchmarks/roofline.py names."""
    "tests/kernels/test_triton_fit.py",
    "tests/kernels/test_triton_solvers.py",
)
CALIBRATION = Calibration(samples=8, seqlen=256)
"""What models are quantized on: a small text, so that the CPU is soon done, too."""
TOKENS, SLICE = 2048, 64
"""Tokens that matrices are quantized on, and rows of them that the CPU quantizes."""
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 4096), (128256, 4096))
"""Outputs and inputs of the matrices."""
KINDS = (
    Product(4, 128, "in", 0, False, False, 1),
    Product(3, 128, "in", 0, False, False, 1),
    Product(5, 128, "in", 0, False, False, 1),
    Product(8, 128, "in", 0, False, False, 1),
    Product(3, 16, "in", 0, True, False, 1),
    Product(3, 16, "in", 0, True, True, 1),
    Product(4, 64, "out", 0, False, False, 1),
)
"""Kinds of packed matrices, which get their inputs and rows of activations below."""
BATCHES = (1, 4, 16)
INTEGERS = (IntegerProduct(4, 128, 4096, 1), IntegerProduct(4, 0, 4096, 1))
"""Kinds of integer products, of weights of 4 bits with activations of 8, rounding included."""
INTEGER_OUTPUTS = 14336
"""Outputs of their matrices."""
INTEGER_BATCHES = (1, 4, 16, 256, 2048)
ROTATED = 240_000_000
"""Bytes of matrices that a graph goes through: more than a GPU's cache."""
MOST_MATRICES = 64
"""Matrices of a graph."""
REPLAYS = 7
"""Replays of a graph, of which the median counts."""


def main() -> int:
    if not torch.cuda.is_available():
        print("There is no GPU here that PyTorch knows. With one, this would")
        print(f"  run {' and '.join(TESTS)} on it,")
        print(f"  time {len(KINDS)} kinds of matrices in {len(SHAPES)} shapes for {BATCHES} rows,")
        print(f"  and {len(INTEGERS)} kinds of integer products for {INTEGER_BATCHES} tokens,")
        print(f"  and attention over {' and '.join(map(str, CONTEXTS))} tokens,")
        methods = ", ".join(gpu_quantizing.SOLVERS)
        print(f"  quantize matrices, a block and the demo model on it by {methods},")
        print("  and write benchmarks/results/gpu-NAME.json.")
        return 0
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    found = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tests": tested(),
        "products": [row for shape in SHAPES for row in timed_shape(shape)] + timed_integers(),
        "quantizing": quantized(),
        "products": [row for shape in SHAPES for row in timed_shape(shape)],
        "attention": [timed_attention(context) for context in CONTEXTS],
    }
    path = ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{path} written")
    return int(found["tests"] != 0)


def tested() -> int:
    """Exit status of the tests of the programs, on the GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    on_gpu = os.environ | {"TRITON_INTERPRET": "0"}  # which gpu_compile took out
    return subprocess.run(command, cwd=ROOT, env=on_gpu, check=False).returncode


def quantized() -> dict[str, Any]:
    """Seconds of quantizing on the GPU, and how good the result is beside the CPU's."""
    shape = gpu_quantizing.EIGHT_BILLION
    with tempfile.TemporaryDirectory() as scratch:
        block, model = Path(scratch, "one"), Path(scratch, "other")
        block.mkdir()
        model.mkdir()
        found: dict[str, Any] = {
            "matrices": gpu_quantizing.solved_matrices(shape, "cuda", TOKENS, SLICE),
            "block": gpu_quantizing.solved_block(shape, "cuda", CALIBRATION, block),
        }
        try:
            found["model"] = gpu_quantizing.solved_model("demo", "cuda", CALIBRATION, 512, model)
        except CheckpointError as error:
            found["model"] = str(error)  # the demo model is not installed here
    return found


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
        matrices = copies(lambda: gridded(kind))  # noqa: B023
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
def timed_attention(context: int) -> dict[str, Any]:
    """Microseconds of one query over 4-bit keys and values, beside PyTorch's over float16."""
    query = torch.randn(1, KV_HEADS * COPIES, 1, DIM, dtype=torch.float16, device="cuda")
    shape = (2, 1, KV_HEADS, context, DIM)
    floats = copies(lambda: torch.randn(shape, dtype=torch.float16, device="cuda"))
    slow = replayed(
        [partial(scaled_dot_product_attention, query, *both, enable_gqa=True) for both in floats]
    )
    del floats
    grid = torch.rand(KV_HEADS, DIM, device="cuda") + 0.5
    shape = (*shape[:4], packed_bytes(DIM, 4))
    codes = copies(lambda: torch.randint(256, shape, dtype=torch.uint8, device="cuda"))
    moved = codes[0].nbytes
    states = [[PackedStates(each, 4, grid, grid, query.dtype) for each in both] for both in codes]
    scoring = Scoring(DIM**-0.5)
    spent = replayed([partial(attend, query, *both, None, scoring, keep=False) for both in states])
    row = {
        "context": context,
        "microseconds": round(spent, 2),
        "float16_microseconds": round(slow, 2),
        "times_float16": round(slow / spent, 2),
        "gigabytes_per_second": round(moved / spent / 1e3, 1),
    }
    print(row, flush=True)
    return row


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


def on_device(value: Any) -> Any:
    """``value``, a matrix or a grid, with all its tensors on the GPU."""
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    from gpu_device import moved

    return moved(value, "cuda")


def copies(make: Callable[[], Any]) -> list[Any]:
    """As many matrices of one kind as fill `ROTATED` bytes, two at least."""
    first = make()
    tensors = [first] if isinstance(first, Tensor) else first.parts()[0]
    nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    count = min(MOST_MATRICES, max(2, -(-ROTATED // nbytes)))
    return [first, *(make() for _ in range(count - 1))]


def microseconds(multiply: Callable[[Tensor, Any], Any], matrices: list[Any], batch: int) -> float:
    """Microseconds of one product, all of which run one after another in a CUDA graph."""
    x = torch.randn(batch, columns_of(matrices[0]), dtype=torch.float16, device="cuda")
    """Microseconds of one product."""
    columns = matrices[0].columns if isinstance(matrices[0], UnitMatrix) else len(matrices[0])
    x = torch.randn(batch, columns, dtype=torch.float16, device="cuda")
    return replayed([partial(multiply, x, matrix) for matrix in matrices])


def replayed(calls: list[Callable[[], Any]]) -> float:
    """Microseconds of one of ``calls``, which run one after another in a CUDA graph."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    spent = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        spent.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(spent)


def columns_of(matrix: UnitMatrix | GriddedMatrix | Tensor) -> int:
    """Number of inputs of a matrix; a float one is transposed."""
    if isinstance(matrix, Tensor):
        return len(matrix)
    return matrix.columns if isinstance(matrix, UnitMatrix) else matrix.inputs.columns


if __name__ == "__main__":
    sys.exit(main())
