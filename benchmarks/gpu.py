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
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
from torch import Tensor

import gpu_quantizing
from gpu_compile import Product, qtensor_of
from quantine import Calibration
from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.errors import CheckpointError
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix, unit_matrix

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/kernels/test_triton_matrix.py",
    "tests/kernels/test_triton_columns.py",
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
        methods = ", ".join(gpu_quantizing.SOLVERS)
        print(f"  quantize matrices, a block and the demo model on it by {methods},")
        print("  and write benchmarks/results/gpu-NAME.json.")
        return 0
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    found = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tests": tested(),
        "quantizing": quantized(),
        "products": [row for shape in SHAPES for row in timed_shape(shape)],
    }
    path = ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{path} written")
    return int(found["tests"] != 0)


def tested() -> int:
    """Exit status of the tests of the programs, on the GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


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
        rows.append(
            {
                "kind": replace(kind, columns=inputs, batch=batch).name,
                "outputs": outputs,
                "microseconds": round(spent, 2),
                "float16_microseconds": round(float16[batch], 2),
                "times_float16": round(float16[batch] / spent, 2),
                "gigabytes_per_second": round(moved / spent / 1e3, 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


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


def on_device(q: QTensor) -> QTensor:
    """``q`` with all its tensors on the GPU."""
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    from gpu_device import moved

    found: QTensor = moved(q, "cuda")
    return found


def copies(make: Callable[[], Any]) -> list[Any]:
    """As many matrices of one kind as fill `ROTATED` bytes, two at least."""
    first = make()
    tensors = [first] if isinstance(first, Tensor) else first.parts()[0]
    nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    count = min(MOST_MATRICES, max(2, -(-ROTATED // nbytes)))
    return [first, *(make() for _ in range(count - 1))]


def microseconds(multiply: Callable[[Tensor, Any], Any], matrices: list[Any], batch: int) -> float:
    """Microseconds of one product, all of which run one after another in a CUDA graph."""
    columns = matrices[0].columns if isinstance(matrices[0], UnitMatrix) else len(matrices[0])
    x = torch.randn(batch, columns, dtype=torch.float16, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        for matrix in matrices:
            multiply(x, matrix)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for matrix in matrices:
            multiply(x, matrix)
    spent = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        spent.append(start.elapsed_time(end) * 1e3 / len(matrices))
    return statistics.median(spent)


if __name__ == "__main__":
    sys.exit(main())
