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
    on_cpu = found["device"] == "cpu"
    machine = f"{found['threads']} threads" if on_cpu else found["device"]
    gives = "memory gives" if on_cpu else "copying in its memory moves"
    console.print(
        f"{machine}, {found['level']}, {found['arithmetic']} by plan; "
        f"{gives} {with_range(found['read'], 'GB/s')}"
    )
    arithmetics = ("exact", "fast") if on_cpu else ("float16",)
    if found["kernels"]:
        console.print(_matrix_table(found["kernels"], arithmetics))
    if found["decoded"]:
        console.print("no kernel multiplies these matrices, which are decoded at each use:")
        rows = [{**one, "decoded": one["speed"]} for one in found["decoded"]]
        console.print(_matrix_table(rows, ("decoded",)))
    console.print(_text_table(found["text"]))


def _matrix_table(kernels: list[dict[str, Any]], arithmetics: tuple[str, ...]) -> Table:
    """How fast the weights of each kind of matrix are read by a multiplication."""
    speeds = [f"{name} GB/s" for name in arithmetics]
    table = new_table("first of", "matrices", "shape", "bits", *speeds, "of memory")
    for kernel in kernels:
        timed = [kernel[name] for name in arithmetics]
        table.add_row(
            kernel["name"],
            str(kernel["matrices"]),
            " x ".join(map(str, kernel["shape"])),
            f"{kernel['bits_per_weight']:.2f}",
            *(f"{one['median']:.1f}" for one in timed),
            " / ".join(f"{one['share']:.0%}" for one in timed),
        )
    return table


def _text_table(rows: list[dict[str, Any]]) -> Table:
    """How fast prompts are read and tokens written, by model and context."""
    table = new_table("model", "context", "prefill tokens/s", "decode tokens/s")
    for row in rows:
        speeds = with_range(row["prefill"]), with_range(row["decode"])
        table.add_row(row["name"], str(row["context"]), *speeds)
    return table
