"""Attention of a prompt with rounded probabilities: tile by tile against whole matrices of scores.

Both work by turns in one process; times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from quantine.kernels.kv_attention.reference import attend_reference
from quantine.kernels.kv_attention.scoring import Scoring
from quantine.kernels.kv_attention.tiled import attend_in_tiles

SCORING = Scoring(0.125, None, 8, True)


def main() -> None:
    asked = parse()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    table = Table("tokens", "whole", "tiles, kept", "tiles", "whole / tiles")
    table.box, table.pad_edge = None, False
    for tokens in asked.tokens:
        query = torch.randn(asked.batch, 9, tokens, 64)
        key, value = torch.randn(2, asked.batch, 3, tokens, 64).unbind()
        mask = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)
        states = (query, key, value, mask)
        work: list[Callable[..., Any]] = [
            lambda *args: attend_reference(*args, SCORING),
            lambda *args: attend_in_tiles(*args, SCORING, True),
            lambda *args: attend_in_tiles(*args, SCORING, False),
        ]
        turns = [[seconds(each, states) for each in work] for _ in range(asked.runs + 1)][1:]
        times = [statistics.median(column) for column in zip(*turns, strict=True)]
        shown = [f"{value * 1e3:.2f} ms" for value in times]
        table.add_row(str(tokens), *shown, f"{times[0] / times[2]:.2f}x")
    Console().print(table)


def seconds(work: Callable[..., Any], states: tuple[torch.Tensor, ...]) -> float:
    started = time.perf_counter()
    work(*states)
    return time.perf_counter() - started


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 2048])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=9)
    return parser.parse_args()


if __name__ == "__main__":
    main()
