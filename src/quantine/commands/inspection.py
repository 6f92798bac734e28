"""The verb `inspect`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from quantine.commands.arguments import add_verb
from quantine.commands.json_output import check_writable, write_json_output


def add(verbs: Any) -> None:
    """Add the verb and its options to the subparsers ``verbs``."""
    parser = add_verb(
        verbs,
        "inspect",
        _run,
        "What a quantized directory holds, counted from its files.",
        "  quantine inspect out\n  quantine inspect out --layers --json out.json\n"
        "  quantine inspect out --plot pictures",
    )
    parser.add_argument("directory", metavar="OUT", type=Path, help="a quantized directory")
    parser.add_argument("--layers", action="store_true", help="list every layer, not one per kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="DIR",
        help="draw sensitivity and outliers of every matrix, and errors and sizes by block",
    )


def _run(arguments: argparse.Namespace) -> None:
    check_writable(arguments.json)
    from quantine.formats.inventory import inventory
    from quantine.report.layer_order import natural_order, recorded_order
    from quantine.report.tables.inventory import print_inventory

    found = inventory(arguments.directory)
    found["layers"] = natural_order(found["layers"], recorded_order(arguments.directory))
    print_inventory(found, arguments.layers)
    write_json_output(arguments.json, found)
    if arguments.plot is not None:
        _draw(arguments.directory, arguments.plot)


def _draw(directory: Path, target: Path) -> None:
    from quantine.report.plots.draw import draw

    pictures = draw(directory, target, lambda path: print(f"drawn: {path}", file=sys.stderr))
    for line in pictures.left_out:
        print(f"left out: {line}")
    print(f"pictures: {len(pictures.files)} files (.png and .svg) in {target}")
