"""The terminal that tables are printed on, and how an empty table looks."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.table import Table

PLAIN_WIDTH: Final = 200
"""Characters in a line where output goes to a file or a pipe."""


def make_console(quiet: bool = False, stderr: bool = False) -> Console:
    """A console that prints text as it is; lines are `PLAIN_WIDTH` wide where it is no terminal.

    Args:
        quiet: print nothing at all.
        stderr: print to standard error, not to standard output.
    """
    console = Console(quiet=quiet, stderr=stderr, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def new_table(*columns: str) -> Table:
    """A table without rows and without lines; long cells are folded, not cut."""
    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
