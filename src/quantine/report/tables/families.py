"""The table of what can be done with the causal language models of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Console

from quantine.report.tables.console import new_table

PARTS: Final = ("weights", "activations", "native")
"""Keys of what can be done, in the order of the columns."""


def print_families(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print what can be done with each class, and with how many.

    Args:
        rows: of `quantine.survey.verdict.Verdict.as_dict`.
        console: where it is printed.
    """
    table = new_table("class", *PARTS, "reason")
    for row in rows:
        table.add_row(row["class"], *(yes_or_no(row[part]) for part in PARTS), row["reason"])
    console.print(table)
    counts = ", ".join(f"{part} {sum(row[part] for row in rows)}" for part in PARTS)
    console.print(f"{len(rows)} classes: {counts}")


def yes_or_no(value: bool) -> str:
    """How a table shows ``value``."""
    return "yes" if value else "no"
