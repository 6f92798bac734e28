"""The verb `memory`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from quantine.commands.arguments import MODEL_HELP, add_verb, comma_list
from quantine.commands.json_output import check_writable, write_json_output


def add(verbs: Any) -> None:
    """Add the verb and its options to the subparsers ``verbs``."""
    parser = add_verb(
        verbs,
        "memory",
        _run,
        "Predict the memory of serving a model under schemes, from its configuration alone.",
        "  quantine memory opt-66b --batch 64 --seqlen 8192\n"
        "  quantine memory ./Llama-3.2-1B --schemes W16A16,W4A8,W4A4KV",
    )
    text = f"{MODEL_HELP}; or opt-13b, opt-30b, opt-66b, opt-175b, without a download"
    parser.add_argument("model", metavar="MODEL", help=text)
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="sequences; default 1")
    parser.add_argument(
        "--seqlen", type=int, default=2048, metavar="T", help="tokens; default 2048"
    )
    parser.add_argument(
        "--schemes", type=comma_list, metavar="A,B", help="such as W4A16,W4A4KV; default several"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the bytes as JSON")


def _run(arguments: argparse.Namespace) -> None:
    check_writable(arguments.json)
    from quantine.eval.footprint import SCHEMES, footprints
    from quantine.report.tables.console import make_console
    from quantine.report.tables.footprints import print_footprints

    schemes = arguments.schemes or SCHEMES
    found = footprints(arguments.model, arguments.batch, arguments.seqlen, schemes)
    rows = [footprint.as_dict() for footprint in found]
    print_footprints(rows, make_console())
    write_json_output(arguments.json, rows)
