"""The command line: parse, call, print. What it takes is in `quantine.arguments`."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantine.arguments import build_parser
from quantine.errors import PlanError, QuantineError

if TYPE_CHECKING:
    from quantine.calibrate.data import Calibration
    from quantine.plan import Plan

EXIT_REFUSED: Final = 2
EXIT_INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 2 for a refusal, 130 for an interruption."""
    arguments = build_parser().parse_args(argv)
    _quiet_libraries()
    try:
        VERBS[arguments.verb](arguments)
    except QuantineError as error:
        print(f"quantine: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        print("quantine: interrupted; --resume continues a run", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (such as `head`) has what it wanted.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _quantize(arguments: argparse.Namespace) -> None:
    from quantine.pipeline import quantize
    from quantine.progress import Shown
    from quantine.render import make_console

    plan, calibration = _request(arguments)
    shown = None if arguments.quiet else Shown(make_console(stderr=True))
    try:
        result = quantize(
            arguments.model,
            arguments.out,
            plan,
            calibration,
            resume=arguments.resume,
            max_ram=arguments.max_ram,
            progress=shown,
        )
    finally:
        if shown is not None:
            shown.stop()
    if shown is not None:
        totals, run = result.report["totals"], result.report["run"]
        shown.note(
            f"{result.path}: {totals['quantized_weights']:,} weights at "
            f"{totals['bits_per_weight']:.3f} bits in {run['seconds']:.0f} s, "
            f"{run['peak_memory_bytes'] / 1e9:.2f} GB peak"
        )


def _plan(arguments: argparse.Namespace) -> None:
    from quantine.estimate import estimate
    from quantine.prepare import prepare
    from quantine.render import plan_as_json, print_plan

    plan, calibration = _request(arguments)
    job = prepare(arguments.model, plan, calibration)
    size = estimate(job, arguments.max_ram)
    print_plan(job, size, arguments.layers)
    _write_json(arguments.json, plan_as_json(job, size))


def _request(arguments: argparse.Namespace) -> tuple[Plan, Calibration]:
    from quantine.calibrate.data import Calibration
    from quantine.core.spec import GROUP_AXES
    from quantine.plan import Plan

    if arguments.both_axes and arguments.bits_per_weight is None:
        raise PlanError("--both-axes says what --bits-per-weight may choose: give both, or neither")
    calibration = Calibration(
        arguments.calibration,
        arguments.samples,
        arguments.seqlen,
        arguments.seed,
        arguments.bfloat16,
    )
    flags = _scheme_flags(arguments)
    if arguments.plan is not None:
        return Plan.from_file(arguments.plan), calibration
    if arguments.bits_per_weight is not None:
        axes = GROUP_AXES if arguments.both_axes else GROUP_AXES[:1]
        plan = Plan.budget(arguments.bits_per_weight, axes)
    else:
        plan = Plan.preset(arguments.preset or flags.pop("method", "spqr"), **flags)
    return plan if arguments.head_bits is None else plan.with_head(arguments.head_bits), calibration


def _scheme_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The parameters that were given, once none contradicts what decides everything."""

    def given(*keys: str) -> dict[str, Any]:
        values = {key: getattr(arguments, key) for key in keys}
        return {key: value for key, value in values.items() if value is not None}

    flags = given("method", "bits", "group_size")
    whole = [*given("plan", "bits_per_weight", "preset")]
    refused = [*whole[1:], *(flags if whole[:1] != ["preset"] else flags.keys() & {"method"})]
    if whole[:1] == ["plan"]:
        refused += given("head_bits")
    if whole and refused:
        listed = " and ".join(_flag(key) for key in refused)
        raise PlanError(f"{_flag(whole[0])} decides everything: leave out {listed}")
    return flags


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _eval(arguments: argparse.Namespace) -> None:
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise PlanError(f"{arguments.json} cannot be written: there is no such directory")
    import torch

    from quantine.eval.perplexity import evaluate
    from quantine.render import make_console, print_scores, window_line

    console = make_console(arguments.quiet)
    live = console.is_terminal

    def on_window(done: int, count: int, perplexity: float) -> None:
        if live or done == count or done % 8 == 0:
            console.print(window_line(done, count, perplexity), end="\r" if live else "\n")

    scores = evaluate(
        arguments.model,
        arguments.text,
        window=arguments.window,
        limit=arguments.limit,
        reference=arguments.reference,
        dtype=getattr(torch, arguments.dtype),
        on_window=on_window,
    )
    print_scores(scores, console)
    _write_json(arguments.json, scores)


def _generate(arguments: argparse.Namespace) -> None:
    import torch

    from quantine.runtime.generate import stream

    stream(
        arguments.model,
        arguments.prompt,
        tokens=arguments.tokens,
        chat=arguments.chat,
        temperature=arguments.temperature,
        seed=arguments.seed,
        dtype=getattr(torch, arguments.dtype),
        out=sys.stdout,
        log=sys.stderr,
    )


def _inspect(arguments: argparse.Namespace) -> None:
    from quantine.contents import contents
    from quantine.render import print_contents

    found = contents(arguments.directory)
    print_contents(found)
    _write_json(arguments.json, found)
    if arguments.plot is not None:
        _draw(arguments.directory, arguments.plot)


def _bench(arguments: argparse.Namespace) -> None:
    from quantine.eval.speed import measure
    from quantine.render import make_console, print_speeds

    console = make_console(arguments.quiet)
    found = measure(
        arguments.directory,
        against=arguments.against,
        contexts=tuple(arguments.context),
        runs=arguments.runs,
        on_step=lambda step: (
            print(f"timing {step}", file=sys.stderr) if console.is_terminal else None
        ),
    )
    print_speeds(found, console)
    _write_json(arguments.json, found)


def _draw(directory: Path, target: Path) -> None:
    from quantine.plots.draw import draw

    pictures = draw(directory, target, lambda path: print(f"drawn: {path}", file=sys.stderr))
    for line in pictures.left_out:
        print(f"left out: {line}")
    print(f"pictures: {len(pictures.files)} files (.png and .svg) in {target}")


def _write_json(path: Path | None, value: object) -> None:
    if path is not None:
        try:
            text = json.dumps(_finite(value), indent=2, allow_nan=False)
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise PlanError(f"{path} cannot be written: {error}") from error


def _finite(value: object) -> object:
    """``value`` with null for numbers that JSON does not have, such as an infinite perplexity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _quiet_libraries() -> None:
    """Keep other libraries' progress bars and hints out of this program's output."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


VERBS: Final[dict[str, Callable[[argparse.Namespace], None]]] = {
    "quantize": _quantize,
    "plan": _plan,
    "eval": _eval,
    "generate": _generate,
    "inspect": _inspect,
    "bench": _bench,
}
"""What runs a verb of `quantine.arguments`."""


if __name__ == "__main__":
    sys.exit(main())
