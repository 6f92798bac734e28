"""The table of the memory that serving a model takes, by scheme."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from rich.console import Console

from quantine.report.byte_text import megabytes
from quantine.report.tables.console import new_table

PARTS: Final = {
    "weights": "weights",
    "cache": "keys and values",
    "temporary": "temporary",
    "total": "total",
}
"""Head of each column by the key of its bytes."""


def print_footprints(rows: Iterable[Mapping[str, Any]], console: Console) -> None:
    """Print the memory under each scheme.

    Args:
        rows: of `quantine.eval.footprint.Footprint.as_dict`.
    """
    table = new_table("scheme", *PARTS.values())
    for row in rows:
        table.add_row(row["scheme"], *(megabytes(row[part]) for part in PARTS))
    console.print(table)
