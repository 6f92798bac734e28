"""The verbs `quantize` and `plan`."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantine.commands.arguments import (
    MODEL_HELP,
    TEXT_FILES_HELP,
    add_bos,
    add_device,
    add_shards,
    add_verb,
    shards_of,
)
from quantine.commands.json_output import check_writable, write_json_output
from quantine.core.transform_spec import Rotate
from quantine.core.tuning_spec import SETTINGS
from quantine.errors import PlanError

if TYPE_CHECKING:
    from quantine.calibrate.segments import Calibration
    from quantine.plan.plan import Plan
    from quantine.ranks.ranks import Ranks
    from quantine.run.quantize import Result


def add(verbs: Any) -> None:
    """Add the verbs and their options to the subparsers ``verbs``."""
    _add_quantize(verbs)
    _add_plan(verbs)


def _add_quantize(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "quantize",
        _quantize,
        "Quantize a model into a directory.",
        "  quantine quantize demo out --method gptq --bits 4 --samples 32\n"
        "  quantine quantize ./Llama-3.2-1B out --bits 3 --calibration my-text.jsonl\n"
        "  quantine quantize ./Llama-3.2-1B out --bits-per-weight 3.5 --head-bits 8\n"
        "  quantine quantize ./Llama-3.2-1B out --plan plan.yaml\n"
        "  quantine quantize ./Llama-3.2-1B out --target llama.cpp:Q4_K_M\n"
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
        "Show what quantize would do, and what it would take, without loading the model.",
        "  quantine plan demo --method gptq --bits 3\n"
        "  quantine plan ./Llama-3.2-1B --plan plan.yaml --layers\n"
        "  quantine plan ./Llama-3.2-1B --bits 3 --json request.json\n"
        "  quantine plan ./Llama-3.2-1B --bits 3 --probe\n"
        "  quantine plan demo --method gptq --bits 4 --target gguf\n"
        "  quantine plan demo --target llama.cpp:Q4_K_M",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    _add_request(parser)
    parser.add_argument("--layers", action="store_true", help="list every layer, not one per kind")
    parser.add_argument(
        "--probe",
        action="store_true",
        help="quantize one block in a scratch directory; predict time, memory and disk by it",
    )
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
        help="spqr-2bit, spqr-3bit, spqr-4bit, spqr-faithful (the published algorithm); "
        "rtn-ada-3bit, gptq-ada-3bit, spqr-ada-3bit, or -4bit: each layer chooses a group axis; "
        "best-3bit, best-4bit: budgets of 3.3 and 4.25 bits, compensated and tuned, in several "
        "times the minutes",
    )
    parser.add_argument(
        "--scheme",
        metavar="NAME",
        help="weights and activations: W4A16, W4A8, W4A4, W4A4KV (keys and values only), any other "
        "WxAy[KV]; with -strict norm outputs have y bits, too (else 8 at least), -rotated rotates "
        "inputs and values of less than 8 bits, -mixed gives keys bits channel by channel, "
        "-centred rounds keys less their mean before rotary embeddings, -faithful is RPTQ as "
        "published, -tensor and -token are for comparison; with "
        "--bits-per-weight that says what weights have",
    )
    parser.add_argument(
        "--bits-per-weight",
        type=float,
        metavar="X",
        help="a budget over the whole model, such as 3.5; sensitive layers get more of it",
    )
    parser.add_argument(
        "--both-axes",
        action="store_true",
        help="with --bits-per-weight: groups may run along outputs, too; better, but such layers "
        "run more slowly",
    )
    parser.add_argument(
        "--head-bits",
        type=int,
        metavar="B",
        help="bits of the token table and the output head, 2 to 8; 8 lose next to nothing; "
        "default 16",
    )
    parser.add_argument(
        "--loss-weights",
        action="store_true",
        default=None,
        help="calibration tokens, and errors that act together, count by what the float model's "
        "predictions make of them, which a pass of gradients finds; costs minutes, no bytes",
    )
    parser.add_argument(
        "--compensate",
        action="store_true",
        default=None,
        help="matrices also make up for the errors of all before them, which the float model shows "
        "that runs beside; costs minutes, no bytes",
    )
    parser.add_argument(
        "--tune",
        choices=SETTINGS,
        help="afterwards tune codes, scales, zero points, outliers and norms by gradient, so that "
        "blocks and predictions agree with the float model's; costs time, no bytes",
    )
    parser.add_argument(
        "--rotate",
        action="store_true",
        help="before, rotate hidden states and values by folding the rotation into the weights: "
        "the same model with fewer outliers; a shared token table and head become two",
    )
    parser.add_argument("--plan", type=Path, metavar="FILE", help="rules in YAML or JSON instead")
    parser.add_argument(
        "--target",
        metavar="NAME",
        help="llama.cpp:TYPE (Q4_0, Q4_K_M, Q2_K ...) or vllm: solve every matrix in the grid that "
        "the engine has; with other options, or gguf, gptq, compressed-tensors, spqr or float: "
        "refuse what cannot be exported to it without loss",
    )
    parser.add_argument(
        "--calibration",
        default="builtin",
        metavar="NAME|FILE",
        help=f"builtin, wikitext2, c4, ptb, pile-val, or {TEXT_FILES_HELP}; default builtin",
    )
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="segments; default 64")
    parser.add_argument("--seqlen", type=int, metavar="L", help="tokens per segment; default 512")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    add_shards(parser)
    add_bos(parser, "segments")
    add_device(parser)
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="multiply in bfloat16 while calibrating: faster where the processor can",
    )
    add_memory(parser)


def add_memory(parser: argparse.ArgumentParser) -> None:
    """Add the options that bound the memory of a run."""
    parser.add_argument(
        "--max-ram",
        type=gigabytes,
        metavar="GB",
        help="most memory of the process, such as 8G: what it keeps and spills is chosen so; "
        "default: activations take a quarter of the machine's",
    )
    parser.add_argument(
        "--max-vram",
        type=gigabytes,
        metavar="GB",
        help="most memory of a GPU, such as 8G; default nine tenths of what is free there",
    )


def gigabytes(text: str) -> float:
    """The number of GB in ``text``, such as ``8G``, ``8GB`` or ``8``."""
    return float(text.upper().removesuffix("B").removesuffix("G"))


def _quantize(arguments: argparse.Namespace) -> None:
    from quantine.ranks.start import started

    with started(arguments.device) as (ranks, arguments.device):
        arguments.shards = _shards(arguments, ranks.count)
        _quantize_on(arguments, ranks)


def _quantize_on(arguments: argparse.Namespace, ranks: Ranks) -> None:
    from quantine.report.tables.console import make_console
    from quantine.run.progress import Shown
    from quantine.run.quantize import quantize

    plan, calibration = _request(arguments)
    if arguments.target is not None:
        _check_target(arguments, plan, calibration)
    quiet = arguments.quiet or not ranks.first
    shown = None if quiet else Shown(make_console(stderr=True))
    try:
        result = quantize(
            arguments.model,
            arguments.out,
            plan,
            calibration,
            resume=arguments.resume,
            max_ram=arguments.max_ram,
            max_vram=arguments.max_vram,
            progress=shown,
            device=arguments.device,
            ranks=ranks,
        )
    finally:
        if shown is not None:
            shown.stop()
    if shown is not None:
        shown.note(summary(result))


def _shards(arguments: argparse.Namespace, ranks: int) -> int:
    """As many shards as are asked for, or as the run has that is continued."""
    from quantine.run.store import SHARDS, stored_identity

    found = stored_identity(arguments.out) if arguments.resume else None
    if arguments.shards is None and found is not None:
        return int(found.get(SHARDS, 1))
    return shards_of(arguments, ranks)


def summary(result: Result) -> str:
    """A line on what a run made and what it took, and one on the stages, if it was timed."""
    from quantine.report.stage_rows import stage_line, stage_rows

    totals, run = result.report["totals"], result.report["run"]
    made = (
        f"{result.path}: {totals['quantized_weights']:,} weights at "
        f"{totals['bits_per_weight']:.3f} bits in {run['seconds']:.0f} s, "
        f"{run['peak_memory_bytes'] / 1e9:.2f} GB peak"
    )
    return f"{made}\n{stage_line(result.report)}" if stage_rows(result.report) else made


def _plan(arguments: argparse.Namespace) -> None:
    check_writable(arguments.json)
    from quantine.formats.imported import second_rounding
    from quantine.plan.targets import check_target
    from quantine.report.tables.plan import plan_as_json, print_plan
    from quantine.run.estimate import estimate
    from quantine.run.prepare import prepare
    from quantine.run.trial import try_block

    plan, calibration = _request(arguments)
    planned, started = not arguments.probe, time.perf_counter()  # as a run's own clock starts
    job = prepare(arguments.model, plan, calibration, arguments.device, planned=planned)
    if arguments.target is not None:
        check_target(arguments.target, job)
    size = estimate(job, arguments.max_ram, arguments.max_vram)
    rounded = second_rounding(job.source)
    if rounded is not None:
        print(f"note: {rounded}")
    bounds = arguments.max_ram, arguments.max_vram
    trial = try_block(job, *bounds, started=started) if arguments.probe else None
    print_plan(job, size, arguments.layers, trial)
    write_json_output(arguments.json, plan_as_json(job, size, trial))


def _check_target(arguments: argparse.Namespace, plan: Plan, calibration: Calibration) -> None:
    """Refuse a run whose result could not be exported, before it begins."""
    from quantine.plan.targets import check_target
    from quantine.run.prepare import prepare

    job = prepare(arguments.model, plan, calibration, arguments.device, planned=True)
    check_target(arguments.target, job)


def _request(arguments: argparse.Namespace) -> tuple[Plan, Calibration]:
    from quantine.calibrate.segments import Calibration
    from quantine.core.spec import GROUP_AXES
    from quantine.plan.plan import Plan

    if arguments.both_axes and arguments.bits_per_weight is None:
        raise PlanError("--both-axes says what --bits-per-weight may choose: give both, or neither")
    calibration = Calibration(
        arguments.calibration,
        arguments.samples,
        arguments.seqlen,
        arguments.seed,
        arguments.bfloat16,
        arguments.bos,
        shards_of(arguments),
    )
    flags = _scheme_flags(arguments)
    if arguments.target is not None and _decides(arguments):
        from quantine.run.target_plan import target_plan

        transforms = (Rotate(),) if arguments.rotate else ()
        plan = target_plan(arguments.model, arguments.target, transforms, **flags)
        return _completed(plan, arguments), calibration
    if arguments.plan is not None:
        return Plan.from_file(arguments.plan), calibration
    if arguments.bits_per_weight is not None:
        axes = GROUP_AXES if arguments.both_axes else GROUP_AXES[:1]
        plan = Plan.budget(arguments.bits_per_weight, axes)
        if arguments.scheme is not None:
            plan = plan.with_activations(arguments.scheme)
    elif arguments.scheme is not None:
        plan = Plan.scheme(arguments.scheme, **flags)
    else:
        plan = Plan.preset(arguments.preset or flags.pop("method", "spqr"), **flags)
    if arguments.head_bits is not None:
        plan = plan.with_head(arguments.head_bits)
    return _completed(plan, arguments), calibration


def _completed(plan: Plan, arguments: argparse.Namespace) -> Plan:
    """``plan``, with a rotation and with tuning if these are asked for."""
    if arguments.rotate:
        plan = dataclasses.replace(plan, transforms=(Rotate(),))
    if arguments.loss_weights:
        plan = dataclasses.replace(plan, loss_weights=True)
    if arguments.compensate:
        plan = dataclasses.replace(plan, compensate=True)
    if arguments.tune is None:
        return plan
    return dataclasses.replace(plan, tune=SETTINGS[arguments.tune])


def _decides(arguments: argparse.Namespace) -> bool:
    """Whether the target is the plan: if it names grids, and nothing else says what to do."""
    from quantine.formats.foreign.gguf.mixtures import mixture_named
    from quantine.plan.targets import LLAMA_CPP
    from quantine.run.target_plan import has_plan

    said = ["bits", "group_size", "plan", "bits_per_weight", "preset", "scheme", "head_bits"]
    target = arguments.target
    if target.startswith(LLAMA_CPP):
        mixture_named(target.removeprefix(LLAMA_CPP), "")  # refuses what it does not know
        said.append("tune")  # which would leave the grids of llama.cpp's types
    others = [_flag(key) for key in said if getattr(arguments, key) is not None]
    if others and target.startswith(LLAMA_CPP):
        raise PlanError(f"--target {target} decides everything: leave out {' and '.join(others)}")
    return has_plan(target) and not others


def _scheme_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The parameters that were given, once none contradicts what decides everything."""

    def given(*keys: str) -> dict[str, Any]:
        values = {key: getattr(arguments, key) for key in keys}
        return {key: value for key, value in values.items() if value is not None}

    flags = given("method", "bits", "group_size")
    whole = [*given("plan", "bits_per_weight", "preset", "scheme")]
    if whole[:1] == ["bits_per_weight"] and "scheme" in whole:  # which says those of activations
        whole.remove("scheme")
    decided = {"preset": {"method"}, "scheme": {"bits"}}.get(whole[0], set(flags)) if whole else ()
    refused = [*whole[1:], *(key for key in flags if key in decided)]
    if whole[:1] == ["plan"]:
        asked = ["rotate"] if arguments.rotate else []
        refused += [*given("head_bits", "tune", "loss_weights", "compensate"), *asked]
    if whole and refused:
        listed = " and ".join(_flag(key) for key in refused)
        raise PlanError(f"{_flag(whole[0])} decides everything: leave out {listed}")
    return flags


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"
