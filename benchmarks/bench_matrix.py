"""Products with packed matrices: bytes per second against the memory, and time against floats.

Everything takes turns, so that a change of the machine's load meets all of it. Several copies of
each matrix are read one after another, more than caches hold. Shares and ratios are medians of
those of single turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench_bits import machine
from quantine.core.arithmetic import ARITHMETICS, Arithmetic
from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.core.spec import GroupAxis
from quantine.kernels import backend
from quantine.kernels.matrix import FEW_ROWS, multiply, multiply_panels, packed_matrix, read_words
from quantine.kernels.matrix.cpu import Matrix
from quantine.kernels.matrix.reference import multiply_reference

COLD_BYTES: Final = 2**28
"""Bytes of the copies of a matrix, at least."""
READ_BYTES: Final = 2**29
OUTLIERS: Final = 0.01
SPAN: Final = 64
"""Lines that share a second grid: outputs, or inputs where groups run along outputs."""
FLOATS: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Kind:
    """``scale_bits`` 16: float16 scales, as in layout dense; fewer: codes of second grids."""

    bits: int
    group_size: int
    scale_bits: int = 16
    outliers: float = 0.0
    group_axis: GroupAxis = "in"

    def __str__(self) -> str:
        layout = "dense" if self.scale_bits == 16 else "sparse"
        name = f"{layout} {self.bits} bit g{self.group_size}"
        name += " out" if self.group_axis == "out" else ""
        return name + (f" {self.outliers:.0%}" if self.outliers else "")


SPARSE: Final = Kind(4, 16, 3)
FUSED: Final = Kind(4, 16, 3, OUTLIERS)
KINDS: Final = (
    Kind(4, 64),
    Kind(4, 64, group_axis="out"),
    SPARSE,
    Kind(4, 16, 3, group_axis="out"),
    FUSED,
    Kind(3, 64),
    Kind(3, 16, 3),
    Kind(8, 64),
)


def main() -> None:
    arguments = parse()
    if backend.native() is None:
        raise SystemExit("the native extension is off or missing: there is nothing to time")
    results = []
    for shape in arguments.shapes:
        contenders = make_contenders(*shape)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for rows in arguments.rows:
                result = measure(contenders, shape, rows, arguments.runs)
                results.append({**result, "threads": threads})
                show(results[-1])
    if arguments.json is not None:
        found = {"machine": machine(max(arguments.threads)), "results": results}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    def shape(text: str) -> tuple[int, int]:
        out_features, in_features = map(int, text.split("x"))
        return out_features, in_features

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    shapes = [(4096, 4096), (4096, 14336), (14336, 4096)]
    parser.add_argument("--shapes", type=shape, nargs="+", default=shapes, metavar="OUTxIN")
    parser.add_argument("--rows", type=int, nargs="+", default=[1], metavar="N", help="default 1")
    parser.add_argument("--runs", type=int, default=9, metavar="N", help="default 9")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers as JSON")
    return parser.parse_args()


@dataclass(frozen=True)
class Contenders:
    """Copies of one matrix in every form."""

    packed: dict[Kind, list[Matrix]]
    floats: dict[str, list[Tensor]]
    outliers: Tensor
    """``[out, in]`` sparse CSR, float32."""


def make_contenders(out_features: int, in_features: int) -> Contenders:
    packed = {}
    for kind in KINDS:
        qtensor = random_qtensor(out_features, in_features, kind)
        first = packed_matrix(qtensor)
        check(qtensor, first)
        copies = 1 + COLD_BYTES // first.nbytes
        packed[kind] = [first, *(packed_matrix(qtensor) for _ in range(copies - 1))]
        if kind == FUSED:
            assert qtensor.outliers is not None
            dense = torch.zeros(out_features, in_features)
            places = qtensor.outliers.row_indices(), qtensor.outliers.columns
            dense[places] = qtensor.outliers.values.float()
            outliers = dense.to_sparse_csr()
    weight = torch.randn(out_features, in_features)
    floats = {
        name: [weight.to(dtype, copy=True) for _ in range(1 + COLD_BYTES // weight.nbytes)]
        for name, dtype in FLOATS.items()
    }
    return Contenders(packed, floats, outliers)


def random_qtensor(out_features: int, in_features: int, kind: Kind) -> QTensor:
    generator = torch.Generator().manual_seed(0)
    lines, length = out_features, in_features
    if kind.group_axis == "out":
        lines, length = length, lines
    groups = length // kind.group_size

    def codes(bits: int, *shape: int) -> Tensor:
        return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)

    scale: Tensor | Statistic
    if kind.scale_bits == 16:
        scale = (torch.rand(lines, groups, generator=generator) * 0.01 + 1e-3).half()
    else:
        step = torch.full((groups, lines // SPAN), 0.01).half()
        second = Grid(step, torch.full_like(step, -1.0), kind.scale_bits, SPAN)
        scale = Statistic(codes(kind.scale_bits, groups, lines), second)
    zero = codes(kind.bits, lines, groups)
    grid = Grid(scale, zero, kind.bits, kind.group_size, kind.group_axis)
    kept = None
    if kind.outliers:
        chosen = torch.rand(out_features, in_features, generator=generator) < kind.outliers
        kept = Csr.where(chosen, torch.randn(out_features, in_features, generator=generator))
    return QTensor(codes(kind.bits, out_features, in_features), grid, None, kept)


def check(qtensor: QTensor, matrix: Matrix) -> None:
    x = torch.randn(1, matrix.columns, generator=torch.Generator().manual_seed(1))
    for arithmetic in ARITHMETICS:
        wanted = multiply_reference(qtensor, x, arithmetic)
        (found,) = multiply([matrix], x, arithmetic)
        if not torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max())):
            raise SystemExit(f"{arithmetic} products are wrong: times would mean nothing")


def measure(contenders: Contenders, shape: tuple[int, int], rows: int, runs: int) -> dict[str, Any]:
    """Seconds of everything by turns, and what follows from them."""
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1))
    words = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    work: dict[Any, Callable[[], None]] = {"read": lambda: read_words(words)}
    counts = {"read": 1.0}
    for name, weights in contenders.floats.items():
        work[name] = functools.partial(multiply_floats, weights, x.to(FLOATS[name]))
        counts[name] = len(weights)
    transposed = x.T.contiguous()
    work["sparse"] = lambda: torch.sparse.mm(contenders.outliers, transposed)
    for kind, matrices in contenders.packed.items():
        for arithmetic in ARITHMETICS:
            work[kind, arithmetic] = functools.partial(multiply_packed, matrices, x, arithmetic)
            counts[kind, arithmetic] = len(matrices)
    taken: dict[Any, list[float]] = {name: [] for name in work}
    with torch.no_grad():
        for run in range(runs + 1):
            for name, job in work.items():
                started = time.perf_counter()
                job()
                if run > 0:  # the first turn meets cold caches and lazy set-up
                    taken[name].append((time.perf_counter() - started) / counts.get(name, 1))
    return {
        "shape": list(shape),
        "rows": rows,
        "read": statistics.median(READ_BYTES / s / 1e9 for s in taken["read"]),
        "floats": {name: statistics.median(taken[name]) for name in FLOATS},
        "packed": [
            described(kind, arithmetic, contenders.packed[kind][0].nbytes, taken)
            for kind in contenders.packed
            for arithmetic in ARITHMETICS
        ],
        "outliers": {
            arithmetic: {
                "fused": ratio(taken[FUSED, arithmetic], taken[SPARSE, arithmetic]),
                "torch.sparse": 1.0 + ratio(taken["sparse"], taken[SPARSE, arithmetic]),
            }
            for arithmetic in ARITHMETICS
        },
    }


def multiply_floats(weights: list[Tensor], x: Tensor) -> None:
    for weight in weights:
        torch.nn.functional.linear(x, weight)


def multiply_packed(matrices: list[Matrix], x: Tensor, arithmetic: Arithmetic) -> None:
    for matrix in matrices:
        if len(x) <= FEW_ROWS:
            multiply([matrix], x, arithmetic)
        else:
            multiply_panels(matrix, x, arithmetic)


def described(
    kind: Kind, arithmetic: Arithmetic, nbytes: int, taken: dict[Any, list[float]]
) -> dict[str, Any]:
    seconds = taken[kind, arithmetic]
    reading = [s * nbytes / READ_BYTES for s in taken["read"]]
    return {
        "kind": str(kind),
        "arithmetic": arithmetic,
        "bytes": nbytes,
        "seconds": statistics.median(seconds),
        "range": [min(seconds), max(seconds)],
        "gigabytes_per_second": nbytes / statistics.median(seconds) / 1e9,
        "share_of_read": ratio(reading, seconds),
        **{f"against_{name}": ratio(taken[name], seconds) for name in FLOATS},
    }


def ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def show(result: dict[str, Any]) -> None:
    console = Console(width=100)
    shape = " x ".join(map(str, result["shape"]))
    floats = ", ".join(f"{name} {s * 1e3:.1f} ms" for name, s in result["floats"].items())
    console.print(
        f"{shape}, {result['rows']} rows, {result['threads']} threads: "
        f"memory gives {result['read']:.1f} GB/s; PyTorch {floats}"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("matrix", "arithmetic", "ms", "GB/s", "of memory", "x float32", "x bfloat16"):
        table.add_column(column, justify="left" if column == "matrix" else "right")
    for row in result["packed"]:
        table.add_row(
            row["kind"],
            row["arithmetic"],
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['gigabytes_per_second']:.1f}",
            f"{row['share_of_read']:.0%}",
            f"{row['against_float32']:.2f}",
            f"{row['against_bfloat16']:.2f}",
        )
    console.print(table)
    for arithmetic, cost in result["outliers"].items():
        console.print(
            f"{OUTLIERS:.0%} outliers, {arithmetic}: {cost['fused']:.2f} of the time without; "
            f"with torch.sparse {cost['torch.sparse']:.2f}"
        )


if __name__ == "__main__":
    main()
