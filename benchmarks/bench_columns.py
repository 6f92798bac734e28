"""The fit of grids and the column loop: the native kernels against the PyTorch references.

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

from quantine.core.spec import QuantSpec
from quantine.kernels import backend
from quantine.kernels.columns import round_block
from quantine.kernels.columns.columns import AtReach, Columns
from quantine.kernels.columns.reference import round_block_reference
from quantine.kernels.fit import fit_groups
from quantine.kernels.fit import reference as fit
from quantine.kernels.fit.fitted import FittedGroups
from quantine.kernels.fit.grid_cost import GridCost

INPUTS = 128
GROUP = 16
SPEC = QuantSpec(3, GROUP, scale_bits=3, stat_group_size=64)
COST = GridCost("hessian", 0.01, look_ahead=True)


def main() -> None:
    arguments = parse()
    if backend.native() is None:
        raise SystemExit("the native extension is off or missing: there is nothing to compare")
    torch.set_num_threads(1)
    rows = [
        {"kernel": kernel.__name__, "rows": count, **kernel(count, arguments.runs)}
        for count in arguments.rows
        for kernel in (fitting, rounding)
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
    parser.add_argument("--runs", type=int, default=10, metavar="N", help="default 10")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers as JSON")
    return parser.parse_args()


def fitting(rows: int, runs: int) -> dict[str, Any]:
    """Groups of inputs, their grids fitted as SpQR does."""
    columns, spread = weights(rows).T.unflatten(0, (-1, GROUP)), torch.rand(INPUTS // GROUP, GROUP)
    request = (columns, spread + 0.1, SPEC, COST)
    differing = fit_groups(*request).scales() != fit.fit_groups(*request).scales()
    if float(differing.float().mean()) > 0.05:
        raise SystemExit("the fit is wrong: times would mean nothing")
    return compare(lambda: fit_groups(*request), lambda: fit.fit_groups(*request), runs)


def rounding(rows: int, runs: int) -> dict[str, Any]:
    """A block of columns, rounded with feedback and outliers, its groups fitted on the way."""

    def run(kernel: Callable[[Columns, int, int], None]) -> Columns:
        columns = started(rows)
        kernel(columns, 0, INPUTS)
        return columns

    differing = run(round_block).codes != run(round_block_reference).codes
    if float(differing.float().mean()) > 0.05:
        raise SystemExit("rounding is wrong: times would mean nothing")
    return compare(lambda: run(round_block), lambda: run(round_block_reference), runs)


def weights(rows: int) -> Tensor:
    return torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(0)) * 0.05


def started(rows: int) -> Columns:
    upper = torch.rand(INPUTS, INPUTS, generator=torch.Generator().manual_seed(1)).triu(1) * 0.05
    upper, order = upper + torch.eye(INPUTS), torch.arange(INPUTS)
    fitted = FittedGroups.empty(INPUTS // GROUP, rows, GROUP, SPEC, upper.device)
    at_reach = AtReach(fitted, torch.ones(INPUTS), COST)
    values = fitted.scale.values, fitted.zero.values
    groups = order // GROUP
    return Columns.of(weights(rows), upper, order, SPEC.bits, values, groups, COST.price, at_reach)


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
