"""The verb `bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantine.commands.arguments import add_verb
from quantine.commands.json_output import check_writable, write_json_output
from quantine.errors import PlanError

if TYPE_CHECKING:
    from rich.console import Console


def add(verbs: Any) -> None:
    """Add the verb and its options to the subparsers ``verbs``."""
    parser = add_verb(
        verbs,
        "bench",
        _run,
        "Time a quantized directory on this machine: matrices, prompts and tokens.",
        "  quantine bench out\n  quantine bench out --against bfloat16 --json speed.json\n"
        "  quantine bench out --device cuda --against bfloat16\n"
        "  quantine bench out --breakdown",
    )
    parser.add_argument("directory", metavar="OUT", type=Path, help="a quantized directory")
    parser.add_argument(
        "--against",
        metavar="float32|bfloat16|MODEL",
        help="also time its weights as floats under transformers, or another model, by turns",
    )
    parser.add_argument(
        "--context",
        type=int,
        nargs="+",
        default=[128, 2048],
        metavar="N",
        help="tokens before those that are decoded; default 128 and 2048",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="what is timed: cpu (default), cuda or another of PyTorch's devices",
    )
    parser.add_argument(
        "--breakdown",
        action="store_true",
        help="only where the time of a token goes, stage by stage, after the first --context",
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as JSON")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _run(arguments: argparse.Namespace) -> None:
    check_writable(arguments.json)
    if arguments.breakdown:
        _break_down(arguments)
        return
    from quantine.eval.speed import measure
    from quantine.report.tables.console import make_console
    from quantine.report.tables.speeds import print_speeds

    console = make_console(arguments.quiet)
    found = measure(
        arguments.directory,
        against=arguments.against,
        contexts=tuple(arguments.context),
        runs=arguments.runs,
        device=arguments.device,
        on_step=_progress(console),
    )
    print_speeds(found, console)
    write_json_output(arguments.json, found)


def _break_down(arguments: argparse.Namespace) -> None:
    if arguments.against is not None or arguments.device != "cpu":
        raise PlanError("--breakdown is of native decoding alone: leave out --against and --device")
    from quantine.eval.breakdown import breakdown
    from quantine.report.tables.console import make_console
    from quantine.report.tables.stages import print_stages

    console = make_console(arguments.quiet)
    found = breakdown(
        arguments.directory,
        context=arguments.context[0],
        runs=arguments.runs,
        on_step=_progress(console),
    )
    print_stages(found, console)
    write_json_output(arguments.json, found)


def _progress(console: Console) -> Callable[[str], None]:
    return lambda step: print(f"timing {step}", file=sys.stderr) if console.is_terminal else None
