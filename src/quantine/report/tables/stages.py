"""The table of where the time of a token goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from quantine.eval.score_text import with_range
from quantine.report.tables.console import new_table


def print_stages(found: Mapping[str, Any], console: Console) -> None:
    """Print what `quantine.eval.breakdown.breakdown` returned."""
    console.print(
        f"a token after {found['context']}, {found['threads']} threads, {found['level']}: "
        f"{with_range(found['token'], 'us')}; memory gives {with_range(found['read'], 'GB/s')}"
    )
    table = new_table("stage", "us", "of the token", "MB", "of memory")
    whole = sum(stage["microseconds"] for stage in found["stages"]) + found["outside"]
    for stage in found["stages"]:
        reads = stage["bytes"] > 0
        table.add_row(
            stage["name"],
            f"{stage['microseconds']:.0f}",
            f"{stage['microseconds'] / whole:.0%}",
            f"{stage['bytes'] / 1e6:.2f}" if reads else "",
            f"{stage['share']:.0%}" if reads else "",
        )
    table.add_row("outside", f"{found['outside']:.0f}", f"{found['outside'] / whole:.0%}", "", "")
    nbytes = sum(stage["bytes"] for stage in found["stages"])
    least = nbytes / found["read"]["median"] / 1e3
    table.add_row("all", f"{whole:.0f}", "100%", f"{nbytes / 1e6:.2f}", f"{least / whole:.0%}")
    console.print(table)
    console.print(
        f"{found['steps']} parallel steps, at whose ends the calling thread waits "
        f"{found['waiting']:.0f} us"
    )
