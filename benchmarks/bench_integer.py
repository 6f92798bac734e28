"""Products in integers against PyTorch's Linear in bfloat16 and float32.

Weights are 4 bit in as many groups as there are clusters of inputs, of uneven sizes; activations
have 8 or 4 bits, and rounding them counts. All work by turns in one process, so that a change of
the machine's load meets all. The table shows the least and the median time of integers, and how
many times as long PyTorch takes: by the least times, and by the median of the ratios of
neighbouring runs. PyTorch gets activations in its dtype, integers float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

from quantine.core.grid import Grid
from quantine.core.qtensor import QTensor
from quantine.core.spec import CLUSTERS
from quantine.kernels import backend
from quantine.kernels.integer import levels, multiply, native_grid
from quantine.kernels.integer.input_grid import InputGrid
from quantine.kernels.matrix import packed_matrix

SHAPES = ("2048x2048", "4096x4096", "8192x2048", "2048x8192")


def main() -> None:
    arguments = parse()
    if backend.native() is None:
        raise SystemExit("no extension: there is nothing to compare")
    torch.set_num_threads(arguments.threads)
    table = Table(
        "outputs x inputs", "rows", "scheme", "level", "least", "median", "bfloat16", "float32"
    )
    table.box, table.pad_edge = None, False
    for shape in arguments.shapes:
        outputs, inputs = map(int, shape.split("x"))
        for rows in arguments.rows:
            for bits in arguments.bits:
                row = measured(outputs, inputs, rows, bits, arguments)
                table.add_row(shape, str(rows), f"W4A{bits}", levels()[0], *row)
    Console().print(table)


def measured(
    outputs: int, inputs: int, rows: int, bits: int, arguments: argparse.Namespace
) -> list[str]:
    torch.manual_seed(0)
    sizes = uneven(inputs, arguments.clusters)
    q = clustered(outputs, sizes)
    matrix, grid = packed_matrix(q), native_grid(input_grid(len(sizes), bits, arguments.factors))
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    small, halves = x.bfloat16(), weight.bfloat16()
    work: list[Callable[[], Tensor]] = [
        lambda: multiply(matrix, grid, x),
        lambda: linear(small, halves),
        lambda: linear(x, weight),
    ]
    for each in work:
        each()
    turns = [[seconds(each) for each in work] for _ in range(arguments.runs)]
    own, *others = zip(*turns, strict=True)
    times = [f"{value * 1e3:.2f} ms" for value in (min(own), statistics.median(own))]
    for other in others:
        least = min(other) / min(own)
        median = statistics.median(slow / fast for fast, slow in zip(own, other, strict=True))
        times.append(f"{least:.2f}x / {median:.2f}x")
    return times


def uneven(inputs: int, clusters: int) -> tuple[int, ...]:
    """Sizes that sum to ``inputs``, the largest some fifteen times the smallest."""
    shares = torch.rand(clusters) ** 2 + 0.05
    sizes = (shares / shares.sum() * (inputs - clusters)).int() + 1
    sizes[-1] += inputs - int(sizes.sum())
    return tuple(sizes.tolist())


def clustered(outputs: int, sizes: tuple[int, ...]) -> QTensor:
    codes = torch.randint(0, 16, (outputs, sum(sizes)), dtype=torch.uint8)
    scale = (torch.rand(outputs, len(sizes)) * 0.01 + 1e-3).half()
    zero = torch.randint(0, 16, (outputs, len(sizes)), dtype=torch.uint8)
    return QTensor(codes, Grid(scale, zero, 4, CLUSTERS, sizes=sizes))


def input_grid(clusters: int, bits: int, factors: bool) -> InputGrid:
    scale, zero = torch.full((clusters,), 6 / 2**bits), torch.full((clusters,), 7.0)
    return InputGrid(bits, scale, zero, 1.0 if factors else None)


def seconds(work: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="outputs x inputs")
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4], help="of activations")
    parser.add_argument("--clusters", type=int, default=32)
    parser.add_argument("--factors", action="store_true", help="divide each row by its factor")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=15)
    return parser.parse_args()


if __name__ == "__main__":
    main()
