"""The command line: parse, call, print."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantine import __version__
from quantine.commands import comparison, evaluation, report
from quantine.commands.base import DTYPES, MODEL_HELP, add_verb, dump_json
from quantine.errors import PlanError, QuantineError

if TYPE_CHECKING:
    from quantine.calibrate.data import Calibration
    from quantine.plan import Plan

EXIT_REFUSED: Final = 2
EXIT_INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    The exit status is 0, 1 for a verdict below its floor, 2 for a refusal, 130 for an interruption.
    """
    arguments = build_parser().parse_args(argv)
    _quiet_libraries()
    try:
        status: int | None = arguments.run(arguments)
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
    return status or 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of every verb; parsing imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="quantine",
        description="Make large language models small without making them worse.",
        epilog="examples:\n"
        "  quantine quantize demo out --method gptq --bits 4\n"
        "  quantine eval out --reference demo --window 1024 --limit 8\n"
        '  quantine generate out "The capital of France is"\n\n'
        "`quantine VERB --help` has more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"quantine {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_quantize(verbs)
    _add_plan(verbs)
    evaluation.add(verbs)
    comparison.add(verbs)
    report.add(verbs)
    _add_generate(verbs)
    _add_inspect(verbs)
    _add_bench(verbs)
    return parser


def _add_quantize(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "quantize",
        _quantize,
        "Quantize a model into a directory.",
        "  quantine quantize demo out --method gptq --bits 4 --samples 32\n"
        "  quantine quantize ./Llama-3.2-1B out --bits 3 --calibration my-text.jsonl\n"
        "  quantine quantize ./Llama-3.2-1B out --bits-per-weight 3.5\n"
        "  quantine quantize ./Llama-3.2-1B out --plan plan.yaml\n"
        "  quantine quantize ./Llama-3.2-1B out --bits 3 --resume",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", type=Path, help="output directory, new or empty")
    _add_request(parser)
    parser.add_argument("--resume", action="store_true", help="continue the unfinished run in OUT")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_plan(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "plan",
        _plan,
        "Show what quantize would do, and what it would take, without loading weights.",
        "  quantine plan demo --method gptq --bits 3\n"
        "  quantine plan ./Llama-3.2-1B --plan plan.yaml --layers\n"
        "  quantine plan ./Llama-3.2-1B --bits 3 --json request.json",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    _add_request(parser)
    parser.add_argument("--layers", action="store_true", help="list every layer, not one per kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")


def _add_request(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=("rtn", "gptq", "spqr"), help="default spqr")
    parser.add_argument("--bits", type=int, metavar="B", help="bits per code, 2 to 8; default 4")
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="G",
        help="inputs that share a scale; -1 for the whole row; default 64, for spqr 16",
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="spqr-2bit, spqr-3bit, spqr-4bit, or spqr-faithful (the published algorithm)",
    )
    parser.add_argument(
        "--bits-per-weight",
        type=float,
        metavar="X",
        help="a budget over the whole model, such as 3.5; sensitive layers get more of it",
    )
    parser.add_argument("--plan", type=Path, metavar="FILE", help="rules in YAML or JSON instead")
    parser.add_argument(
        "--calibration",
        default="builtin",
        metavar="NAME|FILE",
        help="builtin, wikitext2, c4, ptb, pile-val, or a .txt, .jsonl or .parquet file; "
        "default builtin",
    )
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="segments; default 64")
    parser.add_argument("--seqlen", type=int, metavar="L", help="tokens per segment; default 512")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="multiply in bfloat16 while calibrating: faster where the processor can",
    )
    parser.add_argument(
        "--max-ram",
        type=float,
        metavar="GB",
        help="activations kept in memory before they go to disk; default a quarter of the memory",
    )


def _add_generate(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "generate",
        _generate,
        "Continue a prompt, token by token.",
        '  quantine generate out "The capital of France is"\n'
        '  quantine generate out "Explain rainbows." --chat --tokens 200',
    )
    parser.add_argument("model", metavar="MODEL|OUT", help=MODEL_HELP)
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="at most; default 64")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the chat template")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy; default 0"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of sampling; default 0")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32")


def _add_inspect(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "inspect",
        _inspect,
        "What a quantized directory holds, counted from its files.",
        "  quantine inspect out\n  quantine inspect out --json out.json\n"
        "  quantine inspect out --plot pictures",
    )
    parser.add_argument("directory", metavar="OUT", type=Path, help="a quantized directory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="DIR",
        help="draw sensitivity and outliers of every matrix, and errors and sizes by block",
    )


def _add_bench(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "bench",
        _bench,
        "Time a quantized directory on this machine: matrices, prompts and tokens.",
        "  quantine bench out\n  quantine bench out --against bfloat16 --json speed.json",
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
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as JSON")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


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
    dump_json(arguments.json, plan_as_json(job, size))


def _request(arguments: argparse.Namespace) -> tuple[Plan, Calibration]:
    from quantine.calibrate.data import Calibration
    from quantine.plan import Plan

    flags = {
        key: getattr(arguments, key)
        for key in ("method", "bits", "group_size")
        if getattr(arguments, key) is not None
    }
    whole = [
        key for key in ("plan", "bits_per_weight", "preset") if getattr(arguments, key) is not None
    ]
    refused = [*whole[1:], *(flags if whole[:1] != ["preset"] else flags.keys() & {"method"})]
    if whole and refused:
        given = " and ".join(_flag(key) for key in refused)
        raise PlanError(f"{_flag(whole[0])} decides everything: leave out {given}")
    calibration = Calibration(
        arguments.calibration,
        arguments.samples,
        arguments.seqlen,
        arguments.seed,
        arguments.bfloat16,
    )
    if arguments.plan is not None:
        return Plan.from_file(arguments.plan), calibration
    if arguments.bits_per_weight is not None:
        return Plan.budget(arguments.bits_per_weight), calibration
    name = arguments.preset or flags.pop("method", "spqr")
    return Plan.preset(name, **flags), calibration


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


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
    dump_json(arguments.json, found)
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
    dump_json(arguments.json, found)


def _draw(directory: Path, target: Path) -> None:
    from quantine.plots.draw import draw

    pictures = draw(directory, target, lambda path: print(f"drawn: {path}", file=sys.stderr))
    for line in pictures.left_out:
        print(f"left out: {line}")
    print(f"pictures: {len(pictures.files)} files (.png and .svg) in {target}")


def _quiet_libraries() -> None:
    """Keep other libraries' progress bars and hints out of this program's output."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
