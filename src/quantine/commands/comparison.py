"""The verb `compare`."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantine.commands.arguments import (
    MODEL_HELP,
    add_bos,
    add_device,
    add_shards,
    add_verb,
    comma_list,
    shards_of,
)
from quantine.commands.evaluation import add_tasks, add_texts, tasks_of

if TYPE_CHECKING:
    from quantine.ranks.ranks import Ranks


def add(verbs: Any) -> None:
    """Add the verb and its options to the subparsers ``verbs``."""
    parser = add_verb(
        verbs,
        "compare",
        _run,
        "Quantize a model under several plans, measure each alike, and make one table. The same "
        "command continues after an interruption; further plans may be added.",
        "  quantine compare demo --plans 3,3.65,4.25 --out sizes --window 1024 --limit 24\n"
        "  quantine compare demo --plans preset:rtn:bits=4,preset:gptq:bits=4,plan.yaml --out c",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--plans",
        type=comma_list,
        required=True,
        metavar="PLAN,...",
        help="plan files, preset:NAME, preset:NAME:bits=3:group_size=64, scheme:W4A8, "
        "scheme:W4A8:method=rtn, or bits per weight: 3.65, 3.65:both_axes=true, 3.65:head_bits=8",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new, or continued")
    parser.add_argument(
        "--calibration",
        default="builtin",
        metavar="NAME|FILE",
        help="as of quantize; default builtin",
    )
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="segments; default 64")
    parser.add_argument("--seqlen", type=int, metavar="L", help="tokens per segment; default 512")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    parser.add_argument(
        "--bfloat16", action="store_true", help="multiply in bfloat16 while calibrating"
    )
    add_shards(parser)
    add_texts(parser)
    add_tasks(parser)
    add_bos(parser, "segments and windows")
    add_device(parser)
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _run(arguments: argparse.Namespace) -> None:
    from quantine.ranks.start import started

    with started(arguments.device) as (ranks, arguments.device):
        _compare(arguments, ranks)


def _compare(arguments: argparse.Namespace, ranks: Ranks) -> None:
    from quantine.calibrate.segments import Calibration
    from quantine.comparison.run import Measured, compare
    from quantine.comparison.short_forms import plans_of
    from quantine.comparison.table import markdown, pareto_front, write_tables
    from quantine.eval.comparison_row import loss_of_quality
    from quantine.formats.directory import writing
    from quantine.report.plots.pareto import pareto_figure, save_figure
    from quantine.report.tables.console import make_console

    console = make_console(arguments.quiet or not ranks.first)
    rows = compare(
        arguments.model,
        plans_of(arguments.plans),
        arguments.out,
        Calibration(
            arguments.calibration,
            arguments.samples,
            arguments.seqlen,
            arguments.seed,
            arguments.bfloat16,
            arguments.bos,
            shards_of(arguments, ranks.count),
        ),
        Measured(
            tuple(arguments.text),
            arguments.window,
            arguments.limit,
            tasks_of(arguments),
            arguments.bos,
        ),
        device=arguments.device,
        ranks=ranks,
        on_step=lambda name: console.print(f"now: {name}"),
    )
    if not ranks.first:
        return
    files = write_tables(rows, arguments.out)
    points = [
        (row["name"], row["bits_per_weight"], loss)
        for row in rows
        if row["plan"] is not None and (loss := loss_of_quality(row)) is not None
    ]
    if points and find_spec("matplotlib") is not None:
        figure = pareto_figure(points, pareto_front(rows))
        with writing(arguments.out):
            files += save_figure(figure, arguments.out / "pareto")
    elif points:
        console.print("no picture: that needs matplotlib: pip install 'quantine[plot]'")
    console.print(markdown(rows))
    console.print(f"written: {', '.join(map(str, files))}")
