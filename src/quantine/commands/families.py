"""The verb `families`."""

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
        "families",
        _run,
        "Which causal language models of the installed transformers can be quantized: each is "
        "tried on a small random model, in seconds.",
        "  quantine families llama GemmaForCausalLM\n  quantine families --json families.json",
    )
    parser.add_argument(
        "classes",
        nargs="*",
        metavar="CLASS",
        help="classes or model types; default all, which takes a quarter of an hour",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")


def _run(arguments: argparse.Namespace) -> None:
    check_writable(arguments.json)
    from quantine.report.tables.console import make_console
    from quantine.report.tables.families import print_families
    from quantine.survey.survey import chosen_classes, survey

    rows = []
    classes = chosen_classes(arguments.classes)
    for number, verdict in enumerate(survey(classes), 1):
        rows.append(verdict.as_dict())
        said = "yes" if verdict.weights else "no"
        print(f"{number}/{len(classes)} {verdict.class_name}: {said}", file=sys.stderr, flush=True)
    print_families(rows, make_console())
    write_json_output(arguments.json, rows)
