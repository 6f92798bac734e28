"""The solvers' inner loops: the native kernels against the PyTorch references.

Both work on the same matrices, by turns, so that a change of the machine's load meets both. The
table shows medians; the ratio is the median of the ratios of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.columns import (
    cheapest_grids,
    cheapest_grids_reference,
    round_columns,
    round_columns_reference,
)

GROUP = 16
CANDIDATES = 21
BITS = 3
PRICE = 0.05


def main() -> None:
    arguments = parse()
    if backend.native() is None:
        raise SystemExit("the native extension is off or missing: there is nothing to compare")
    torch.set_num_threads(1)
    rows = [
        {"kernel": kernel.__name__, "rows": count, **kernel(count, arguments.runs)}
        for count in arguments.rows
        for kernel in (search, rounding)
    ]
    table = Table(
        "kernel", "rows", "native", "reference", "ratio", "range", box=None, pad_edge=False
    )
    for row in rows:
        table.add_row(
            row["kernel"],
            str(row["rows"]),
            f"{row['native_seconds'] * 1e6:.0f} us",
            f"{row['reference_seconds'] * 1e6:.0f} us",
            f"{row['ratio']:.1f}x",
            "{:.1f}-{:.1f}".format(*row["ratio_range"]),
        )
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[576, 4096], metavar="R")
    parser.add_argument("--runs", type=int, default=30, metavar="N", help="default 30")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers as JSON")
    return parser.parse_args()


def search(rows: int, runs: int) -> dict[str, Any]:
    """One group of inputs, the cheapest of many grids for each row."""
    columns, scales, zeros = matrices(rows)
    request = (columns.unsqueeze(0), torch.rand(1, GROUP), scales, zeros, BITS, PRICE)
    if not torch.equal(cheapest_grids(*request), cheapest_grids_reference(*request)):
        raise SystemExit("the search is wrong: times would mean nothing")
    return compare(
        lambda: cheapest_grids(*request), lambda: cheapest_grids_reference(*request), runs
    )


def rounding(rows: int, runs: int) -> dict[str, Any]:
    """One group of inputs, rounded with feedback and outliers."""
    columns, scales, zeros = matrices(rows)
    local = torch.rand(GROUP, GROUP).triu(1) * 0.1 + torch.eye(GROUP)
    grid = scales[0].expand(GROUP, -1), zeros[0].expand(GROUP, -1)

    def run(kernel: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: kernel(columns.clone(), local, *grid, BITS, PRICE)

    codes, _, _ = run(round_columns)()
    expected, _, _ = run(round_columns_reference)()
    if float((codes != expected).float().mean()) > 0.01:
        raise SystemExit("rounding is wrong: times would mean nothing")
    return compare(run(round_columns), run(round_columns_reference), runs)


def matrices(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(GROUP, rows, generator=generator) * 0.05
    scales = torch.rand(CANDIDATES, 1, rows, generator=generator) * 0.02 + 0.005
    zeros = torch.randint(0, 2**BITS, scales.shape, generator=generator).float()
    return columns, scales, zeros


def compare(fast: Callable[[], Any], slow: Callable[[], Any], runs: int) -> dict[str, Any]:
    """Medians over interleaved runs."""
    native, reference = [], []
    for _ in range(runs):
        native.append(seconds(fast))
        reference.append(seconds(slow))
    ratios = [late / early for late, early in zip(reference, native, strict=True)]
    return {
        "native_seconds": statistics.median(native),
        "reference_seconds": statistics.median(reference),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "runs": runs,
    }


def seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
