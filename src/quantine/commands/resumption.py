"""The verb `resume`: a run is continued; a finished one is tuned, or layers of it done again."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from quantine.commands.arguments import MODEL_HELP, TEXT_FILES_HELP, add_device, add_verb
from quantine.commands.quantization import add_memory, summary
from quantine.core.tuning_spec import SETTINGS
from quantine.errors import PlanError, shown

if TYPE_CHECKING:
    from quantine.ranks.ranks import Ranks
    from quantine.run.request import Request


def add(verbs: Any) -> None:
    """Add the verb and its options to the subparsers ``verbs``."""
    parser = add_verb(
        verbs,
        "resume",
        _resume,
        "Continue a run of quantize; or tune a finished one, or do single layers of it again.",
        "  quantine resume out\n"
        "  quantine resume out --model /elsewhere/Llama-3.2-1B\n"
        "  quantine resume out --redo 'model.layers.12.*' --set damp=0.05\n"
        "  quantine resume out --tune quick",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="directory that quantize was given")
    parser.add_argument("--model", metavar="MODEL", help=f"where the model is now: {MODEL_HELP}")
    parser.add_argument(
        "--calibration", metavar="NAME|FILE", help=f"where the text is now: {TEXT_FILES_HELP}"
    )
    parser.add_argument(
        "--redo",
        metavar="PATTERN",
        help="quantize layers of these names again, and the blocks after them, which then read "
        "other inputs",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="with --redo: another parameter for these layers, such as damp=0.05; may be repeated",
    )
    parser.add_argument(
        "--tune", choices=SETTINGS, help="tune what is finished, as quantize would have done"
    )
    add_device(parser)
    add_memory(parser)
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _resume(arguments: argparse.Namespace) -> None:
    from quantine.ranks.start import started

    with started(arguments.device) as (ranks, arguments.device):
        _resume_on(arguments, ranks)


def _resume_on(arguments: argparse.Namespace, ranks: Ranks) -> None:
    from quantine.report.tables.console import make_console
    from quantine.run.progress import Shown
    from quantine.run.reopen import begin_redo, begin_tuning
    from quantine.run.request import stored_request
    from quantine.run.resume import resume

    changes = _changes(arguments.set)
    if (arguments.redo is None) != (not changes):
        raise PlanError("--redo says which layers, and --set what is new for them: give both")
    if arguments.redo is not None and arguments.tune is not None:
        raise PlanError("--redo and --tune are one after the other: first --redo, then --tune")
    if arguments.tune is not None and ranks.count > 1:
        raise PlanError("tuning is not shared by ranks: run one process")

    def request_to_carry_out() -> Request:
        request = stored_request(arguments.out)
        if arguments.model is not None:
            request = replace(request, model=arguments.model)
        if arguments.calibration is not None:
            calibration = replace(request.calibration, source=arguments.calibration)
            request = replace(request, calibration=calibration)
        if arguments.redo is not None:
            return begin_redo(arguments.out, request, arguments.redo, changes, arguments.device)
        if arguments.tune is not None:
            tuning = SETTINGS[arguments.tune]
            return begin_tuning(arguments.out, request, tuning, arguments.device)
        return request

    request = ranks.of_first(request_to_carry_out)
    quiet = arguments.quiet or not ranks.first
    shown_progress = None if quiet else Shown(make_console(stderr=True))
    try:
        result = resume(
            arguments.out,
            request,
            arguments.max_ram,
            arguments.max_vram,
            shown_progress,
            arguments.device,
            ranks,
        )
    finally:
        if shown_progress is not None:
            shown_progress.stop()
    if shown_progress is not None:
        shown_progress.note(summary(result))


def _changes(given: list[str]) -> dict[str, Any]:
    """The parameters of ``--set``, read as YAML reads them."""
    found = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise PlanError(f"--set takes KEY=VALUE, such as damp=0.05, not {shown(text)}")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise PlanError(f"--set {shown(text)} has no value that can be read") from error
    return found
