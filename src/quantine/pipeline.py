"""The one loop that quantizes a model, block by block."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from quantine.adadim import output_losses, solve_choice
from quantine.allocate import Allocation, probe
from quantine.calibrate.data import Calibration
from quantine.calibrate.sequential import Sequential
from quantine.core.observe import Hessian
from quantine.errors import OutputError
from quantine.estimate import Estimate, estimate
from quantine.families.base import Layer, block_list
from quantine.formats.checkpoint import Checkpoint
from quantine.formats.store import (
    REPORT,
    Reports,
    RunStore,
    check_identity,
    clear_remains,
    is_finished,
    read_json,
)
from quantine.matrix import (
    as_stored,
    install,
    present_weight,
    read_weight,
    sensitivity,
    solve,
    unpack,
)
from quantine.plan import Decision, Plan, with_clusters
from quantine.prepare import Job, check_headers, check_place, prepare
from quantine.progress import (
    Progress,
    Silent,
    peak_memory,
    return_freed_memory,
    reuse_freed_memory,
)
from quantine.publish import output_files, report_of
from quantine.rptq.blocks import float_tensors, prepare_block, restore_block
from quantine.rptq.clusters import Heads
from quantine.scheme import scheme_from

PROBE: Final = "probe"
"""Name under which a run keeps what choices would cost."""


@dataclass(frozen=True)
class Result:
    """A finished output directory.

    Attributes:
        path: the directory.
        report: the content of its ``quantine_report.json``.
    """

    path: Path
    report: dict[str, Any]


def quantize(
    model: str | Path,
    out: str | Path,
    plan: Plan | None = None,
    calibration: Calibration | None = None,
    *,
    resume: bool = False,
    max_ram: float | None = None,
    progress: Progress | None = None,
) -> Result:
    """Quantize a model into a directory that `quantine.load` and transformers open.

    Args:
        model: see `quantine.runtime.source.locate`.
        out: output directory; must not exist, be empty, or hold an unfinished run to ``resume``.
        plan: what is done to which matrix; default is SpQR at 4 bits in groups of 16.
        calibration: text and sampling; default is the built-in text.
        resume: continue the unfinished run in ``out``; the result has the same bytes (apart from
            measured times) as an uninterrupted one.
        max_ram: GB (1e9 bytes) that calibration activations may take in memory before they go to
            disk; default is a quarter of the machine's memory.
        progress: receives events while the run goes on.

    Raises:
        QuantineError: of the kind that says what is wrong, before work starts where that can be.
    """
    started = time.perf_counter()
    reuse_freed_memory()
    out = Path(out)
    progress = progress or Silent()
    job = prepare(model, plan or Plan.preset("spqr"), calibration or Calibration())
    size = estimate(job, max_ram)
    check_place(out, resume, size.disk_while_running)
    store = RunStore(out)
    try:
        return _run(job, store, size, progress, started)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        said = "the disk is full: free some space and" if full else f"{error}: mend that and"
        raise OutputError(f"{out} cannot be written: {said} continue with --resume") from error
    finally:
        store.close()


def _run(job: Job, store: RunStore, size: Estimate, progress: Progress, started: float) -> Result:
    out = store.out
    progress.note(f"reading {job.source.name}")
    gguf = job.source.gguf_file is not None
    identity = job.identity(job.source.gguf_digest() if gguf else job.checkpoint().digest())
    check_identity(out, identity)
    if is_finished(out):
        clear_remains(out)
        progress.note(f"{out} is finished already")
        return Result(out, read_json(out / REPORT))
    store.open(identity)
    directory = _convert(job, store.scratch / "source") if gguf else job.source.directory
    checkpoint = job.checkpoint(directory)
    if gguf:
        check_headers(job, checkpoint)
        checkpoint.digest()
    parts = _quantize_all(job, checkpoint, store, size, progress)
    report = report_of(job, identity, store.layer_reports(parts))
    report["run"] = {
        "seconds": round(time.perf_counter() - started, 3),
        "peak_memory_bytes": peak_memory(),
    }
    store.finish(parts, output_files(job, directory, report), report)
    progress.finish(report)
    return Result(out, report)


def _convert(job: Job, directory: Path) -> Path:
    """Write a GGUF model as float32 safetensors, which can be read a block at a time."""
    job.source.float_model(torch.float32).save_pretrained(directory, max_shard_size="2GB")
    job.tokenizer.save_pretrained(directory)
    return directory


def _quantize_all(
    job: Job, checkpoint: Checkpoint, store: RunStore, size: Estimate, progress: Progress
) -> list[str]:
    """Stage every part of the output; the names of the parts, in file order."""
    loose = _stage_loose(job, checkpoint, store)
    outside = _stage_outside(job, checkpoint, store)
    count = len(block_list(job.model, job.family))
    blocks = [_part(index) for index in range(count)]
    done = sum(store.is_committed(part) for part in blocks)
    progress.start(count, done)
    if done < count:
        allocation = _allocation(job, checkpoint, store, size, progress)
        sequential = _enter(job, checkpoint, store, size)
        for index, part in enumerate(blocks):
            if sequential is not None:
                sequential.load(index)
            if store.is_committed(part):
                reports = store.layer_reports([part])
                _restore_block(job, store.tensors(part), index, reports)
                if allocation is not None:
                    allocation.spend(reports)
            else:
                _quantize_block(job, checkpoint, sequential, store, index, allocation, progress)
            if sequential is not None:
                sequential.advance(index)
                sequential.release(index)
            return_freed_memory()
            progress.block(index)
    return [*outside, *loose, *blocks]


def _stage_loose(job: Job, checkpoint: Checkpoint, store: RunStore) -> list[str]:
    """Stage the float tensors outside of blocks, each a part of its own."""
    parts = job.loose_names()
    for name in parts:
        if not store.is_committed(name):
            store.commit(name, _kept(job, checkpoint, [name]), [])
    return parts


def _stage_outside(job: Job, checkpoint: Checkpoint, store: RunStore) -> list[str]:
    """Quantize what a plan asks for outside of blocks: embedding and head."""
    outside = [d for d in job.scheme_layers() if d.layer.role != "block"]
    for decision in outside:
        layer = decision.layer
        if not store.is_committed(layer.name):
            weight = read_weight(checkpoint, layer, job.stored_name(f"{layer.name}.weight"))
            _, packed, report = solve(decision, weight, None)
            store.commit(layer.name, packed, [report])
    return [decision.layer.name for decision in outside]


def _enter(job: Job, checkpoint: Checkpoint, store: RunStore, size: Estimate) -> Sequential | None:
    """The calibration segments at the first block, past what is quantized before it."""
    if job.segments is None:
        return None
    replaced = {}
    for decision in job.scheme_layers():
        if decision.layer.role == "embedding" and not job.plan.float_inputs:
            packed = store.tensors(decision.layer.name)
            replaced[f"{decision.layer.name}.weight"] = unpack(decision, packed).dequantize()
    spill = store.scratch / "activations" if size.spills else None
    return Sequential(
        job.model,
        job.family,
        checkpoint,
        job.segments,
        spill,
        replaced,
        job.calibration.bfloat16,
        size.resumes,
    )


def _part(index: int) -> str:
    return f"block-{index:05}"


def _allocation(
    job: Job, checkpoint: Checkpoint, store: RunStore, size: Estimate, progress: Progress
) -> Allocation | None:
    """The budget of a plan that has one; what layers may cost is probed once per run."""
    if job.plan.bits_per_weight is None:
        return None
    table = store.recall(PROBE)
    if table is None:
        table = probe(job, checkpoint, store.scratch / "probe", size.resumes, progress)
        store.remember(PROBE, table)
    return Allocation(job, table)


def _restore_block(job: Job, tensors: dict[str, Tensor], index: int, reports: Reports) -> None:
    """Give a block that an earlier run finished its quantized weights, if they feed the next."""
    if job.plan.float_inputs:
        return
    if job.plan.activations is not None:
        path = f"{job.family.blocks}.{index}"
        block = job.model.get_submodule(path)
        restore_block(job.model, block, path, job.family, job.plan.activations, tensors)
    schemes = {report["name"]: scheme_from(report["scheme"], "report") for report in reports}
    for decision in job.block_schemes(index):
        decision = replace(decision, scheme=schemes[decision.layer.name])
        install(job.model, decision.layer, unpack(decision, tensors))


def _quantize_block(
    job: Job,
    checkpoint: Checkpoint,
    sequential: Sequential | None,
    store: RunStore,
    index: int,
    allocation: Allocation | None,
    progress: Progress,
) -> None:
    """Quantize the matrices of a block, group after group, and commit them."""
    reports = []
    maps: dict[str, Tensor] = {}
    schemes = job.block_schemes(index)
    tensors: dict[str, Tensor] = {}
    if job.plan.activations is None or sequential is None:
        tensors = _kept(job, checkpoint, job.block_names(index))
    else:
        schemes, tensors, maps = _reordered(job, checkpoint, sequential, index)
    groups = sorted({d.layer.group for d in schemes if d.layer.group is not None})
    losses = {} if sequential is None else output_losses(job, sequential, index)
    hessians = _observed(job, sequential, index, groups)
    for group in groups:
        hessian = next(hessians)
        for decision in (d for d in schemes if d.layer.group == group):
            layer = decision.layer
            weight = _float_weight(job, checkpoint, layer)
            if allocation is not None and decision.searched:
                qtensor, packed, report = allocation.solve(decision, weight, hessian, progress)
            elif decision.choices:
                qtensor, packed, report = solve_choice(decision, weight, hessian, losses)
            else:
                qtensor, packed, report = solve(decision, weight, hessian)
            if sequential is not None and not job.plan.float_inputs:
                install(job.model, layer, qtensor)
            tensors.update(packed)
            maps.update(sensitivity(decision, weight, hessian, qtensor))
            reports.append(report)
            progress.layer(report)
    store.commit(_part(index), tensors, reports, maps)


def _reordered(
    job: Job, checkpoint: Checkpoint, sequential: Sequential, index: int
) -> tuple[list[Decision], dict[str, Tensor], dict[str, Tensor]]:
    """Reorder a block and let it round its activations.

    Returns:
        What is decided about its layers, with their clusters, the floats that stay, and the
        clusters for pictures.
    """
    assert job.plan.activations is not None
    path = f"{job.family.blocks}.{index}"
    block = job.model.get_submodule(path)
    heads = Heads.of(job.config, job.family)
    spec = job.plan.activations
    reordering = prepare_block(sequential, index, block, job.family, heads, spec)
    schemes = [
        with_clusters(d, reordering.input_clusters(d.layer.name.removeprefix(f"{path}.")).sizes)
        for d in job.block_schemes(index)
    ]
    packed = [decision.layer.name for decision in schemes]
    maps = {f"{path}.{kind}": found for kind, found in reordering.maps().items()}
    return schemes, float_tensors(block, path, checkpoint, packed), maps


def _float_weight(job: Job, checkpoint: Checkpoint, layer: Layer) -> Tensor:
    """The weight of a layer in a block, ``[out, in]`` float32, as it was before quantization."""
    if job.plan.activations is None:
        return read_weight(checkpoint, layer, f"{layer.name}.weight")
    return present_weight(job.model, layer)


def _observed(
    job: Job, sequential: Sequential | None, index: int, groups: Sequence[int]
) -> Iterator[Hessian | None]:
    """Statistics of each group's input; where the plan wants it so, taken only when asked for."""
    if sequential is None:
        yield from [None] * len(groups)
        return
    paths = [job.family.groups[group][0] for group in groups]
    if job.plan.float_inputs or not job.plan.true_sequential:
        yield from sequential.observe(index, paths)
        return
    for path in paths:
        yield sequential.observe_next(index, path)


def _kept(job: Job, checkpoint: Checkpoint, names: list[str]) -> dict[str, Tensor]:
    """The float tensors ``names`` as the output stores them."""
    stored = {name: job.stored_name(name) for name in names}
    half = job.writes_spqr()
    return {
        name: as_stored(name, checkpoint.read([source])[source], half)
        for name, source in stored.items()
    }
