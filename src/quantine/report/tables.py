"""Tables for people."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table

from quantine.eval.score_text import recovery, with_error
from quantine.run.job import NO_LAYER

PLAIN_WIDTH: Final = 200

if TYPE_CHECKING:
    from quantine.plan.decision import Decision
    from quantine.run.estimate import Estimate
    from quantine.run.job import Job


class _Console(Console):
    """A console that leaves a closed pipe to the program."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def make_console(quiet: bool = False, stderr: bool = False) -> Console:
    """A console; where it is no terminal, lines are as wide as they need to be."""
    console = _Console(quiet=quiet, stderr=stderr, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def megabytes(nbytes: float) -> str:
    """Bytes as MB (1e6) or GB (1e9)."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def window_line(text: str, done: int, count: int, perplexity: float) -> str:
    """Progress of an evaluation."""
    return f"{text}: window {done}/{count}  perplexity so far {perplexity:.3f}"


def print_scores(scores: dict[str, Any], console: Console) -> None:
    """The result of `quantine.eval.evaluate.evaluate`."""
    compared = scores["reference"] is not None
    heads = ["text", "scored", "perplexity"]
    if compared:
        heads += ["reference", "recovery (95%)", "KL, nats per token", "top-1 agreement"]
    table = _table(*heads, "seconds")
    for name, text in scores["texts"].items():
        cells = [
            name,
            f"{text['tokens']:,} tokens, {text['windows']} windows of {text['window']}",
            with_error(text["perplexity"], text["stderr"], ".3f"),
        ]
        if compared:
            cells += [
                f"{text['reference_perplexity']:.3f}",
                recovery(text),
                with_error(text["kl"], text["kl_stderr"], ".5f"),
                with_error(text["top1"], text["top1_stderr"], ".2%"),
            ]
        table.add_row(*cells, f"{text['seconds']:.1f}")
    console.print(table)
    if scores["tasks"]:
        console.print(_task_table(scores["tasks"], compared))
    console.print(
        f"{scores['bits_per_weight']:.3f} bits per weight, weight files "
        f"{megabytes(scores['model_bytes'])}"
        + (f"; compared with {scores['reference']}" if compared else "")
    )


def _task_table(tasks: dict[str, Any], compared: bool) -> Table:
    heads = ["task", "asked", "score"]
    table = _table(*heads, *(["reference", "recovery (95%)"] if compared else []))
    for name, task in tasks.items():
        cells = [
            name,
            f"{task['questions']:,} questions, {task['fewshot']} examples each",
            f"{task['metric']} {with_error(task['score'], task['stderr'], '.2%')}",
        ]
        if compared:
            cells += [f"{task['reference_score']:.2%}", recovery(task)]
        table.add_row(*cells)
    return table


def print_plan(job: Job, size: Estimate, every_layer: bool) -> None:
    """What `quantine plan` shows."""
    console = make_console()
    table = _table("layer", "shape", "scheme", "bits/weight", "size", "why")
    for name, decision, count in _rows(job.decisions, every_layer):
        layer, scheme = decision.layer, decision.scheme
        shape = f"{layer.out_features} x {layer.in_features}" + (f"  x{count}" if count > 1 else "")
        if scheme is None:
            stored = ["16 bit", "16", megabytes(2 * count * layer.weights)]
            columns = ["shared", "", ""] if job.shares_table(layer) else stored
            table.add_row(name, shape, *columns, decision.reason)
            continue
        nbytes = job.packed_bytes(decision)
        chosen = f"one of {len(decision.choices)} choices" if decision.choices else ""
        table.add_row(
            name,
            shape,
            chosen or describe(scheme.as_dict()),
            f"{nbytes * 8 / layer.weights:.3f}",
            megabytes(nbytes * count),
            decision.reason,
        )
    for name, sizes in job.other_matrices().items():
        shape = " x ".join(map(str, sizes))
        table.add_row(name, shape, "16 bit", "16", megabytes(2 * math.prod(sizes)), NO_LAYER)
    console.print(table)
    for line in plan_lines(job, size):
        console.print(line)


def plan_lines(job: Job, size: Estimate) -> list[str]:
    """Totals of a plan."""
    place = "on disk" if size.spills else "in memory"
    tokens = f"{size.tokens:,} tokens of {job.calibration.source}" if size.tokens else "none"
    return [
        f"quantized: {size.weights:,} weights at {size.bits_per_weight:.3f} bits "
        f"= {megabytes(size.packed)}",
        *_outlier_lines(job),
        f"norms, biases and what stays in 16 bit: {megabytes(size.kept)}",
        f"output: {megabytes(size.output)}; on disk while running: at most "
        f"{megabytes(size.disk_while_running)}",
        f"peak memory: about {megabytes(size.peak_memory)} "
        f"(activations {megabytes(size.activations)} {place})",
        f"calibration: {tokens}",
    ]


def _outlier_lines(job: Job) -> list[str]:
    """A warning where the size depends on outliers that only the run will find."""
    open_ended = [
        d for d in job.scheme_layers() if d.scheme and d.scheme.solver.outlier_share is None
    ]
    if not any(not decision.choices for decision in open_ended):
        return []
    return ["outliers come on top: 3 to 4 bytes each, as many as the threshold lets through"]


def plan_as_json(job: Job, size: Estimate) -> dict[str, Any]:
    """Everything `quantine plan` knows."""
    return {
        "model": job.source.name,
        "family": job.family.name,
        "plan": job.plan.as_dict(),
        "layers": [
            {
                "name": d.layer.name,
                "shape": [d.layer.out_features, d.layer.in_features],
                "scheme": None if d.scheme is None or d.choices else d.scheme.as_dict(),
                "choices": [choice.as_dict() for choice in d.choices],
                "bytes": None if d.scheme is None else job.packed_bytes(d),
                "reason": d.reason,
            }
            for d in job.decisions
        ],
        "other_matrices": [
            {"name": name, "shape": list(shape), "reason": NO_LAYER}
            for name, shape in job.other_matrices().items()
        ],
        "predicted": {
            "quantized_weights": size.weights,
            "quantized_bytes": size.packed,
            "bits_per_weight": size.bits_per_weight,
            "kept_bytes": size.kept,
            "output_bytes": size.output,
            "disk_while_running_bytes": size.disk_while_running,
            "peak_memory_bytes": size.peak_memory,
            "activation_bytes": size.activations,
            "activations_on_disk": size.spills,
            "calibration_tokens": size.tokens,
        },
    }


def print_contents(found: dict[str, Any]) -> None:
    """What `quantine inspect` shows."""
    console = make_console()
    columns = ["layer", "shape", "scheme", "bits/weight", "size", "output error"]
    chosen = any(layer["choice"] for layer in found["layers"])
    table = _table(*columns, *(["losses of the choices", "margin"] if chosen else []))
    for layer in found["layers"]:
        error = layer["output_error"]
        table.add_row(
            layer["name"],
            " x ".join(map(str, layer["shape"])),
            describe(layer["scheme"]),
            f"{layer['bits_per_weight']:.3f}",
            megabytes(layer["bytes"]),
            "not measured" if error is None else f"{error:.3%}",
            *(_choice_columns(layer["choice"]) if chosen else []),
        )
    console.print(table)
    totals = found["totals"]
    for line in (
        f"quantized: {totals['quantized_weights']:,} weights at "
        f"{totals['bits_per_weight']:.3f} bits = {totals['quantized_bytes']:,} bytes",
        f"kept: {len(found['kept'])} tensors = {totals['kept_bytes']:,} bytes",
        f"file headers: {totals['header_bytes']:,} bytes",
        f"weight files: {totals['file_bytes']:,} bytes",
        f"arithmetic: {found['arithmetic']}",
        f"kernel: {found['kernel']['name']}: {found['kernel']['why']}",
    ):
        console.print(line)


def _choice_columns(choice: dict[str, Any] | None) -> list[str]:
    """The losses of a layer's choices, and how much more the next best loses."""
    if choice is None:
        return ["", ""]
    several = len({(one["method"], one["bits"]) for one in choice["choices"]}) > 1
    losses = [
        (f"{one['method']} {one['bits']} bit " if several else "")
        + f"{_group(one)} {one['loss']:.3g}"
        for one in choice["choices"]
    ]
    return [", ".join(losses), f"{choice['margin']:.1%}"]


def _group(scheme: dict[str, Any]) -> str:
    along_inputs = scheme.get("group_axis", "in") == "in"
    if scheme["group_size"] == -1:
        return "row" if along_inputs else "column"
    if scheme["group_size"] == 0:
        return "clusters"
    return f"g{scheme['group_size']}" + ("" if along_inputs else " out")


def describe(scheme: dict[str, Any]) -> str:
    """A scheme in a few words."""
    kind = "sym" if scheme["sym"] else "asym"
    return f"{scheme['method']} {scheme['bits']} bit {_group(scheme)} {kind}, {scheme['format']}"


def _rows(decisions: Iterable[Decision], every_layer: bool) -> Iterable[tuple[str, Decision, int]]:
    """Name, decision and count of each row; layers that differ only by block share one."""
    if every_layer:
        return [(d.layer.name, d, 1) for d in decisions]
    rows: dict[tuple[object, ...], tuple[str, Decision, int]] = {}
    for d in decisions:
        layer = d.layer
        name = (
            layer.name.replace(f".{layer.block}.", ".*.", 1)
            if layer.block is not None
            else layer.name
        )
        key = (name, layer.out_features, layer.in_features, d.scheme, d.reason)
        rows[key] = (name, d, rows[key][2] + 1 if key in rows else 1)
    return rows.values()


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_speeds(found: dict[str, Any], console: Console) -> None:
    """What `quantine.eval.speed.measure` found."""
    read = found["read"]
    console.print(
        f"{found['threads']} threads, {found['level']}, {found['arithmetic']} by plan; "
        f"memory gives {read['median']:.1f} GB/s ({read['low']:.1f}-{read['high']:.1f})"
    )
    kernels = _table(
        "first of", "matrices", "shape", "bits", "exact GB/s", "fast GB/s", "of memory"
    )
    for kernel in found["kernels"]:
        exact, fast = kernel["exact"], kernel["fast"]
        kernels.add_row(
            kernel["name"],
            str(kernel["matrices"]),
            " x ".join(map(str, kernel["shape"])),
            f"{kernel['bits_per_weight']:.2f}",
            f"{exact['median']:.1f}",
            f"{fast['median']:.1f}",
            f"{exact['share']:.0%} / {fast['share']:.0%}",
        )
    console.print(kernels)
    text = _table("model", "context", "prefill tokens/s", "decode tokens/s")
    for row in found["text"]:
        cells = [
            f"{row[kind]['median']:.1f} ({row[kind]['low']:.1f}-{row[kind]['high']:.1f})"
            for kind in ("prefill", "decode")
        ]
        text.add_row(row["name"], str(row["context"]), *cells)
    console.print(text)


def print_footprints(rows: Iterable[dict[str, Any]], console: Console) -> None:
    """What `quantine.eval.footprint.footprints` found, as plain values."""
    parts = ("weights", "cache", "temporary", "total")
    table = _table("scheme", "weights", "keys and values", "temporary", "total")
    for row in rows:
        table.add_row(row["scheme"], *(megabytes(row[part]) for part in parts))
    console.print(table)
