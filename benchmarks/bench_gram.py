"""The sum of outer products in bfloat16: the native kernel against the PyTorch reference.

Both work on the same inputs, by turns, so that a change of the machine's load meets both. The
table shows medians; the ratio is the median of the ratios of neighbouring runs.
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

from quantine.core.process_memory import reuse_freed_memory
from quantine.kernels import backend
from quantine.kernels.gram import add_gram
from quantine.statistics import hessian as observe

TOKENS = 2048


def main() -> None:
    arguments = parse()
    native = backend.native()
    if native is None or not native.multiplies_tiles():
        raise SystemExit("no extension, or no AMX: there is nothing to compare")
    torch.set_num_threads(1)
    reuse_freed_memory()  # as a run does
    table = Table("inputs", "native", "reference", "ratio", box=None, pad_edge=False)
    for inputs in arguments.inputs:
        x, total = torch.randn(TOKENS, inputs).bfloat16(), torch.zeros(inputs, inputs)
        pairs = [
            (seconds(add_gram, total, x), seconds(observe.add_gram, total, x))
            for _ in range(arguments.runs)
        ]
        own, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(slow / fast for fast, slow in pairs)
        table.add_row(str(inputs), f"{own * 1e3:.1f} ms", f"{other * 1e3:.1f} ms", f"{ratio:.1f}x")
    Console().print(table)


def seconds(work: Callable[[Tensor, Tensor], None], total: Tensor, x: Tensor) -> float:
    started = time.perf_counter()
    work(total, x)
    return time.perf_counter() - started


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, nargs="+", default=[576, 1536, 4096])
    parser.add_argument("--runs", type=int, default=15)
    return parser.parse_args()


if __name__ == "__main__":
    main()
