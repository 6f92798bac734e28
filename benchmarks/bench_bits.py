"""Unpacking of codes: the native kernel against the PyTorch reference.

Both unpack the same matrix, by turns, so that a change of the machine's load meets both. The table
shows medians; the ratio is the median of the ratios of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from quantine.kernels import backend
from quantine.kernels.bits import pack, unpack
from quantine.kernels.bits.reference import unpack_reference

SHAPES = ((576, 1536), (4096, 1024))


def main() -> None:
    arguments = parse()
    if backend.native() is None:
        raise SystemExit("the native extension is off or missing: there is nothing to compare")
    torch.set_num_threads(arguments.threads)
    rows = [
        measure(out_features, in_features, bits, arguments.runs)
        for out_features, in_features in SHAPES
        for bits in arguments.bits
    ]
    show(rows)
    if arguments.json is not None:
        result = {"machine": machine(arguments.threads), "results": rows}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8], metavar="B")
    parser.add_argument("--runs", type=int, default=15, metavar="N", help="default 15")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers as JSON")
    return parser.parse_args()


def measure(out_features: int, in_features: int, bits: int, runs: int) -> dict[str, Any]:
    """Medians over ``runs`` of one shape, after one unmeasured run that compares the results."""
    generator = torch.Generator().manual_seed(0)
    shape = (out_features, in_features)
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    if not (
        torch.equal(unpack(packed, bits, in_features), codes)
        and torch.equal(unpack_reference(packed, bits, in_features), codes)
    ):
        raise SystemExit(f"unpacking {bits} bits is wrong: times would mean nothing")
    native, reference = [], []
    for _ in range(runs):
        native.append(seconds(unpack, packed, bits, in_features))
        reference.append(seconds(unpack_reference, packed, bits, in_features))
    ratios = [slow / fast for slow, fast in zip(reference, native, strict=True)]
    return {
        "shape": list(shape),
        "bits": bits,
        "native_seconds": statistics.median(native),
        "reference_seconds": statistics.median(reference),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "native_codes_per_second": codes.numel() / statistics.median(native),
        "runs": runs,
    }


def seconds(function: Any, *arguments: Any) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("matrix", "bits", "native", "reference", "ratio", "range", "native codes/s"):
        table.add_column(column, justify="left" if column == "matrix" else "right")
    for row in rows:
        low, high = row["ratio_range"]
        table.add_row(
            " x ".join(map(str, row["shape"])),
            str(row["bits"]),
            f"{row['native_seconds'] * 1e3:.2f} ms",
            f"{row['reference_seconds'] * 1e3:.2f} ms",
            f"{row['ratio']:.1f}x",
            f"{low:.1f}-{high:.1f}",
            f"{row['native_codes_per_second'] / 1e9:.2f} G",
        )
    Console().print(table)


def machine(threads: int) -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
