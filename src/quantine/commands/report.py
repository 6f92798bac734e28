"""The verb `report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from quantine.commands.arguments import add_verb, comma_list
from quantine.commands.json_output import check_writable

EXIT_BELOW: Final = 1
"""Exit status where a number is below its floor."""


def add(verbs: Any) -> None:
    """Add the verb and its options to the subparsers ``verbs``."""
    parser = add_verb(
        verbs,
        "report",
        _run,
        "Write one HTML page about a quantized directory, and judge it. The exit status is 1 if a "
        "number is below its floor.",
        "  quantine report out --floor recovery=0.98\n"
        "  quantine report out --comparison sizes --html out.html",
    )
    parser.add_argument("directory", metavar="OUT", type=Path, help="written by quantize")
    parser.add_argument(
        "--floor",
        type=comma_list,
        default=[],
        metavar="NAME=X,...",
        help="least share of the float model's quality on every text and task that was recorded, "
        "as recovery=0.98, or of the same most likely tokens, as top1=0.9",
    )
    parser.add_argument(
        "--comparison", type=Path, metavar="DIR", help="show the place among these plans"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="default OUT/quantine_report.html"
    )


def _run(arguments: argparse.Namespace) -> int:
    check_writable(arguments.html)
    from quantine.eval.score_text import JUDGED
    from quantine.formats.directory import PAGE
    from quantine.report.facts import gather
    from quantine.report.page import write_page
    from quantine.report.tables.console import make_console
    from quantine.report.verdict import floors_of, keep_floors

    floors = floors_of(arguments.floor)
    facts = gather(arguments.directory, floors, arguments.comparison)
    if floors:
        keep_floors(arguments.directory, floors)
    path = arguments.html or arguments.directory / PAGE
    write_page(facts, path)
    console = make_console()
    for check in facts.checks:
        word = "ok" if check.passed else "below the floor"
        value, floor = f"{check.value:{JUDGED}}", f"{check.floor:{JUDGED}}"
        console.print(f"{check.name}: {value}, floor {floor}: {word}")
    console.print(f"written: {path}")
    return 0 if all(check.passed for check in facts.checks) else EXIT_BELOW
