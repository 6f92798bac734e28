"""The tables of a model's speed, next to that of the memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from quantine.eval.score_text import with_range
from quantine.report.tables.console import new_table


def print_speeds(found: Mapping[str, Any], console: Console) -> None:
    """Print what `quantine.eval.speed.measure` returned."""
    console.print(
        f"{found['threads']} threads, {found['level']}, {found['arithmetic']} by plan; "
        f"memory gives {with_range(found['read'], 'GB/s')}"
    )
    console.print(_matrix_table(found["kernels"]))
    console.print(_text_table(found["text"]))


def _matrix_table(kernels: list[dict[str, Any]]) -> Table:
    """How fast the weights of each kind of matrix are read by a multiplication."""
    table = new_table(
        "first of", "matrices", "shape", "bits", "exact GB/s", "fast GB/s", "of memory"
    )
    for kernel in kernels:
        exact, fast = kernel["exact"], kernel["fast"]
        table.add_row(
            kernel["name"],
            str(kernel["matrices"]),
            " x ".join(map(str, kernel["shape"])),
            f"{kernel['bits_per_weight']:.2f}",
            f"{exact['median']:.1f}",
            f"{fast['median']:.1f}",
            f"{exact['share']:.0%} / {fast['share']:.0%}",
        )
    return table


def _text_table(rows: list[dict[str, Any]]) -> Table:
    """How fast prompts are read and tokens written, by model and context."""
    table = new_table("model", "context", "prefill tokens/s", "decode tokens/s")
    for row in rows:
        speeds = with_range(row["prefill"]), with_range(row["decode"])
        table.add_row(row["name"], str(row["context"]), *speeds)
    return table
