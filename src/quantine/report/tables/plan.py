"""The table of what a plan does with each layer, and what the run would take."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from quantine.calibrate.bos import SEGMENTS_BEGUN
from quantine.core.activation_spec import SITES, UNQUANTIZED
from quantine.core.device import is_here
from quantine.errors import cut
from quantine.report.byte_text import megabytes
from quantine.report.tables.console import make_console, new_table
from quantine.report.tables.layer_rows import LayerRow, layer_rows
from quantine.report.tables.scheme_text import scheme_text
from quantine.run.left_alone import left_alone, left_lines
from quantine.run.working_set import may_resume

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quantine.plan.decision import Decision
    from quantine.run.estimate import Estimate
    from quantine.run.job import Job
    from quantine.run.trial import Trial
    from quantine.run.working_set import Residence


def print_plan(job: Job, size: Estimate, every_layer: bool, trial: Trial | None = None) -> None:
    """Print what the run ``job`` would do with each matrix, and the predicted totals.

    Args:
        job: the checked request.
        size: what arithmetic predicts.
        trial: what a block that was tried predicts, if one was.
        every_layer: print a row for each layer, not one for all that differ only by block.
    """
    console = make_console()
    table = new_table("layer", "shape", "scheme", "bits/weight", "size", "why")
    for row in plan_rows(job.decisions, every_layer):
        table.add_row(*_cells(job, row))
    for name, sizes in job.other_matrices().items():
        shape = " x ".join(map(str, sizes))
        size_text = megabytes(2 * math.prod(sizes))
        table.add_row(name, shape, "16 bit", "16", size_text, job.kept_reason(name))
    console.print(table)
    for line in [*plan_lines(job, size), *([] if trial is None else trial_lines(trial))]:
        console.print(line)


def plan_rows(decisions: Iterable[Decision], every_layer: bool = False) -> list[LayerRow[Decision]]:
    """Rows for ``decisions``; those of one row have the same shape, scheme and reason."""

    def alike(decision: Decision) -> tuple[object, ...]:
        layer = decision.layer
        return layer.out_features, layer.in_features, decision.scheme, decision.reason

    return layer_rows(decisions, lambda decision: decision.layer.name, alike, every_layer)


def _cells(job: Job, row: LayerRow[Decision]) -> list[str]:
    decision, count = row.layers[0], len(row.layers)
    layer, scheme = decision.layer, decision.scheme
    cells = [row.name, row.shape((layer.out_features, layer.in_features))]
    if scheme is None:
        if job.shares_table(layer):
            return [*cells, "shared", "", "", decision.reason]
        return [*cells, "16 bit", "16", megabytes(2 * count * layer.weights), decision.reason]
    nbytes = job.packed_bytes(decision)
    chosen = f"one of {len(decision.choices)} choices" if decision.choices else ""
    return [
        *cells,
        chosen or scheme_text(scheme.as_dict()),
        f"{nbytes * 8 / layer.weights:.3f}",
        megabytes(nbytes * count),
        decision.reason,
    ]


def plan_lines(job: Job, size: Estimate) -> list[str]:
    """Lines on the sizes of what the run ``job`` makes, and on what it takes."""
    place = "on disk" if size.spills else "in memory"
    if size.device_memory is not None and size.residence.hidden == "device":
        place = f"on {job.device}"
    begun = SEGMENTS_BEGUN.get(job.begun(), "")
    tokens = f"{size.tokens:,} tokens of {job.calibration.source}" if size.tokens else "none"
    return [
        f"quantized: {size.weights:,} weights at {size.bits_per_weight:.3f} bits "
        f"= {megabytes(size.packed)}",
        *_outlier_lines(job),
        *_activation_lines(job),
        *_left_lines(job),
        f"norms, biases and what stays in 16 bit: {megabytes(size.kept)}",
        f"output: {megabytes(size.output)}; on disk while running: at most "
        f"{megabytes(size.disk_while_running)}",
        f"peak memory: about {megabytes(size.peak_memory)} "
        f"(activations {megabytes(size.activations)} {place}{_spared(job, size.residence)})",
        *_rotation_lines(job),
        *_device_lines(job, size),
        f"calibration: {tokens}{' in segments' * bool(begun)}{begun}",
        *_tuning_lines(job, size),
    ]


def _spared(job: Job, residence: Residence) -> str:
    """What is not kept in memory to stay within its bound, as the end of a phrase."""
    spared = []
    if may_resume(job) and not residence.resumes:
        spared.append("blocks compute again where they stop")
    if not residence.reads_ahead:
        spared.append("blocks are not read ahead")
    return "".join(f"; {one}" for one in spared)


def _tuning_lines(job: Job, size: Estimate) -> list[str]:
    """A line on what the model is tuned on, and how long that takes; none if it is not tuned."""
    if job.tuning_text is None or job.plan.tune is None:
        return []
    seconds = size.tuning_seconds
    takes = (
        ""
        if seconds is None
        else f", about {seconds / 60:.1f} minutes at this machine's present load"
    )
    tune = job.plan.tune
    steps = f"{tune.block_steps} steps of each block, {tune.steps} of the whole"
    return [f"tuning: {steps}, {tune.segments} segments each{takes}"]


def _rotation_lines(job: Job) -> list[str]:
    """Lines where a rotation makes two tables of one, and where it leaves values alone."""
    lines = []
    if job.rotated is not None and job.rotated.values_stay:
        blocks = cut(", ".join(job.rotated.values_stay), 60)
        lines = [f"not rotated: values of {blocks}, of which no reorder is proved"]
    if not job.table_copied:
        return lines
    head = next(decision for decision in job.decisions if decision.layer.role == "head")
    nbytes = 2 * head.layer.weights if head.scheme is None else job.packed_bytes(head)
    return [
        f"rotated: head and token table, which are one in the source, become two; the head's own "
        f"takes {megabytes(nbytes)}",
        *lines,
    ]


def _device_lines(job: Job, size: Estimate) -> list[str]:
    """A line on the memory of the device, where that is not the CPU."""
    if size.device_memory is None:
        return []
    most = "" if size.device_limit is None else f" of at most {megabytes(size.device_limit)}"
    here = "" if is_here(job.device) else "; no such device is here, so this is arithmetic alone"
    return [
        f"peak memory of {job.device}: about {megabytes(size.device_memory)}{most}, batches of "
        f"{size.residence.batch_tokens} tokens{here}"
    ]


def _outlier_lines(job: Job) -> list[str]:
    """A line where the size depends on outliers that only the run will find; else none."""
    open_ended = [
        d for d in job.scheme_layers() if d.scheme and d.scheme.solver.outlier_share is None
    ]
    if not any(not decision.choices for decision in open_ended):
        return []
    return ["outliers come on top: 3 to 4 bytes each, as many as the threshold lets through"]


def _activation_lines(job: Job) -> list[str]:
    """A line on the bits of activations and on what shares a grid; none if none are rounded."""
    spec = job.plan.activations
    if spec is None:
        return []
    sites: dict[int, list[str]] = {}
    for site in SITES:
        sites.setdefault(getattr(spec, site), []).append(site)
    rounded = [
        f"{', '.join(names)} to {bits} bits" for bits, names in sites.items() if bits < UNQUANTIZED
    ]
    if not rounded:
        return []
    rotated = [f"rotated before they are: {', '.join(spec.rotated)}"] if spec.rotated else []
    mixed = f"channels of keys may have different bits, {spec.key} on average"
    return [
        f"rounded while the model runs: {'; '.join(rounded)}, a grid for each {spec.granularity}",
        *rotated,
        *([mixed] if spec.mixed_keys else []),
        *(["keys less a centre that turns with positions"] if spec.centred_keys else []),
    ]


def _left_lines(job: Job) -> list[str]:
    """Lines on activations that are not rounded, one for each reason."""
    return [f"not rounded: {line}" for line in left_lines(left_alone(job))]


def trial_lines(trial: Trial) -> list[str]:
    """Lines on what the whole run will take, by what one block took."""
    return [
        f"block {trial.block + 1} of {trial.blocks} tried: {trial.block_seconds:.1f} s; all in all "
        f"{trial.seconds:.0f} s",
        f"by that block: output {megabytes(trial.output)}; on disk while running: at most "
        f"{megabytes(trial.disk_while_running)}; peak memory {megabytes(trial.peak_memory)}",
    ]


def plan_as_json(job: Job, size: Estimate, trial: Trial | None = None) -> dict[str, Any]:
    """The decision about every matrix and all predicted sizes, as plain values for JSON.

    ``probed`` is there where a block was tried.
    """
    probed = {} if trial is None else {"probed": dataclasses.asdict(trial)}
    return {
        **probed,
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
            {"name": name, "shape": list(shape), "reason": job.kept_reason(name)}
            for name, shape in job.other_matrices().items()
        ],
        "left": left_alone(job),
        "predicted": {
            "quantized_weights": size.weights,
            "quantized_bytes": size.packed,
            "bits_per_weight": size.bits_per_weight,
            "kept_bytes": size.kept,
            "output_bytes": size.output,
            "disk_while_running_bytes": size.disk_while_running,
            "peak_memory_bytes": size.peak_memory,
            "copied_table": job.table_copied,
            "device": str(job.device),
            "device_memory_bytes": size.device_memory,
            "device_limit_bytes": size.device_limit,
            "batch_tokens": size.residence.batch_tokens,
            "activation_bytes": size.activations,
            "activations_on_disk": size.spills,
            "blocks_resume": size.residence.resumes,
            "blocks_read_ahead": size.residence.reads_ahead,
            "calibration_tokens": size.tokens,
            "tuning_seconds": size.tuning_seconds,
        },
    }
