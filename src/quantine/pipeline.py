"""The one loop that quantizes a model, block by block."""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantine.calibrate.data import Calibration
from quantine.calibrate.sequential import Sequential
from quantine.core.observe import Hessian
from quantine.core.qtensor import QTensor
from quantine.errors import OutputError, SolverError
from quantine.estimate import Estimate, estimate
from quantine.families.base import block_list
from quantine.formats import format_named
from quantine.formats.checkpoint import Checkpoint
from quantine.formats.store import (
    REPORT,
    RunStore,
    check_identity,
    clear_remains,
    is_finished,
    read_json,
)
from quantine.plan import Decision, Plan
from quantine.prepare import Job, check_headers, check_place, prepare
from quantine.progress import Progress, Silent, peak_memory
from quantine.publish import output_files, report_of

LARGEST_HALF = 65504.0


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
        plan: what is done to which matrix; default is GPTQ at 4 bits in groups of 64.
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
    out = Path(out)
    progress = progress or Silent()
    job = prepare(model, plan or Plan.preset("gptq"), calibration or Calibration())
    size = estimate(job, max_ram)
    check_place(out, resume, size.disk_while_running)
    try:
        return _run(job, out, size, progress, started)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OutputError(
            f"the disk of {out} is full: free some space and continue with --resume"
        ) from error


def _run(job: Job, out: Path, size: Estimate, progress: Progress, started: float) -> Result:
    progress.note(f"reading {job.source.name}")
    gguf = job.source.gguf_file is not None
    identity = job.identity(job.source.gguf_digest() if gguf else job.checkpoint().digest())
    check_identity(out, identity)
    if is_finished(out):
        clear_remains(out)
        progress.note(f"{out} is finished already")
        return Result(out, read_json(out / REPORT))
    store = RunStore(out)
    store.open(identity)
    directory = _convert(job, store.scratch / "source") if gguf else job.source.directory
    checkpoint = job.checkpoint(directory)
    if gguf:
        check_headers(job, checkpoint)
        checkpoint.digest()
    parts = _quantize_all(job, checkpoint, store, size.spills, progress)
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
    job: Job, checkpoint: Checkpoint, store: RunStore, spills: bool, progress: Progress
) -> list[str]:
    """Stage every part of the output; the names of the parts, in file order."""
    loose = _stage_loose(job, checkpoint, store)
    outside = _stage_outside(job, checkpoint, store)
    count = len(block_list(job.model, job.family))
    blocks = [f"block-{index:05}" for index in range(count)]
    done = [part for part in blocks if store.is_committed(part)]
    progress.start(count, len(done))
    if len(done) < count:
        sequential = _enter(job, checkpoint, store, spills)
        for index, part in enumerate(blocks):
            if part in done:
                if sequential is not None:
                    _replay(job, sequential, store, part, index)
                progress.block(index)
                continue
            _Block(job, checkpoint, sequential, index, progress).quantize(store, part)
            progress.block(index)
    return [*outside, *loose, *blocks]


def _enter(job: Job, checkpoint: Checkpoint, store: RunStore, spills: bool) -> Sequential | None:
    if job.segments is None:
        return None
    replaced = {}
    for decision in job.scheme_layers():
        if decision.layer.role == "embedding":
            packed = store.tensors(decision.layer.name)
            replaced[f"{decision.layer.name}.weight"] = _unpack(decision, packed).dequantize()
    spill = store.scratch / "activations" if spills else None
    return Sequential(job.model, job.family, checkpoint, job.segments, spill, replaced)


def _replay(job: Job, sequential: Sequential, store: RunStore, part: str, index: int) -> None:
    """Run a block that an earlier run finished, with its quantized weights."""
    block = sequential.load(index)
    tensors = store.tensors(part)
    for decision in _inside(job, index):
        _install(block, job, decision, _unpack(decision, tensors))
    sequential.advance(index)
    sequential.release(index)


class _Block:
    """One decoder block on its way from float to packed."""

    def __init__(
        self,
        job: Job,
        checkpoint: Checkpoint,
        sequential: Sequential | None,
        index: int,
        progress: Progress,
    ) -> None:
        self._job = job
        self._checkpoint = checkpoint
        self._sequential = sequential
        self._index = index
        self._progress = progress
        self._tensors: dict[str, Tensor] = {}
        self._reports: list[dict[str, Any]] = []

    def quantize(self, store: RunStore, part: str) -> None:
        """Quantize, commit, and move the activations on."""
        block = None if self._sequential is None else self._sequential.load(self._index)
        for group in range(len(self._job.family.groups)):
            chosen = [d for d in _inside(self._job, self._index) if d.layer.group == group]
            if chosen:
                hessian = self._observe(group)
                for decision in chosen:
                    self._solve(block, decision, hessian)
        kept = stored_floats(self._checkpoint, self._job, self._job.block_names(self._index))
        store.commit(part, {**self._tensors, **kept}, self._reports)
        if self._sequential is not None:
            self._sequential.advance(self._index)
            self._sequential.release(self._index)

    def _observe(self, group: int) -> Hessian | None:
        if self._sequential is None:
            return None
        path = self._job.family.groups[group][0]
        return self._sequential.observe(self._index, path)

    def _solve(self, block: nn.Module | None, decision: Decision, hessian: Hessian | None) -> None:
        weight = _weight(self._checkpoint, decision)
        qtensor, packed, report = solve(decision, weight, hessian)
        self._tensors.update(packed)
        self._reports.append(report)
        self._progress.layer(report)
        if block is not None:
            _install(block, self._job, decision, qtensor)


def solve(
    decision: Decision, weight: Tensor, hessian: Hessian | None
) -> tuple[QTensor, dict[str, Tensor], dict[str, Any]]:
    """Quantize one matrix.

    Args:
        weight: ``[out, in]`` float32.

    Returns:
        The result, its packed tensors by full name, and the layer's report.

    Raises:
        SolverError: names the layer.
    """
    layer, scheme = decision.layer, decision.scheme
    assert scheme is not None
    started = time.perf_counter()
    try:
        qtensor = scheme.solver(weight, hessian, scheme.spec)
    except SolverError as error:
        raise SolverError(f"{layer.name}: {error}") from error
    packed = format_named(scheme.format).pack(qtensor)
    nbytes = sum(tensor.nbytes for tensor in packed.values())
    delta = qtensor.dequantize().sub_(weight)
    report = {
        "name": layer.name,
        "scheme": scheme.as_dict(),
        "shape": [layer.out_features, layer.in_features],
        "weights": layer.weights,
        "bytes": nbytes,
        "bits_per_weight": nbytes * 8 / layer.weights,
        "output_error": _ratio(delta, weight, hessian),
        "weight_error": float(delta.square().sum() / weight.square().sum().clamp(min=1e-30)),
        "damp": hessian.damp_used if hessian and scheme.solver.needs_inputs else None,
        "seconds": round(time.perf_counter() - started, 3),
    }
    return qtensor, {f"{layer.name}.{key}": value for key, value in packed.items()}, report


def stored_floats(checkpoint: Checkpoint, job: Job, names: list[str]) -> dict[str, Tensor]:
    """The float tensors ``names`` as the output stores them: matrices in 16 bit.

    A float32 matrix becomes float16 unless it overflows there; vectors keep their dtype.
    """
    return {
        name: _sixteen(checkpoint.read([job.stored_name(name)])[job.stored_name(name)])
        for name in names
    }


def _sixteen(tensor: Tensor) -> Tensor:
    if tensor.ndim < 2 or tensor.dtype not in {torch.float32, torch.float64}:
        return tensor
    low, high = tensor.aminmax()
    fits = float(low) >= -LARGEST_HALF and float(high) <= LARGEST_HALF
    return tensor.half() if fits else tensor.float()


def _stage_loose(job: Job, checkpoint: Checkpoint, store: RunStore) -> list[str]:
    parts = job.loose_names()
    for name in parts:
        if not store.is_committed(name):
            store.commit(name, stored_floats(checkpoint, job, [name]), [])
    return parts


def _stage_outside(job: Job, checkpoint: Checkpoint, store: RunStore) -> list[str]:
    """Quantize what a plan asks for outside of decoder blocks: embedding and head."""
    parts = []
    for decision in job.scheme_layers():
        if decision.layer.role == "block":
            continue
        part = decision.layer.name
        parts.append(part)
        if not store.is_committed(part):
            name = job.stored_name(f"{part}.weight")
            weight = checkpoint.read([name])[name].float()
            _, packed, report = solve(decision, weight, None)
            store.commit(part, packed, [report])
    return parts


def _inside(job: Job, index: int) -> list[Decision]:
    return [d for d in job.scheme_layers() if d.layer.block == index]


def _weight(checkpoint: Checkpoint, decision: Decision) -> Tensor:
    """The matrix ``[out, in]`` float32 of a layer inside a block."""
    name = f"{decision.layer.name}.weight"
    weight = checkpoint.read([name])[name].float()
    return weight.T.contiguous() if decision.layer.transposed else weight


def _install(block: nn.Module, job: Job, decision: Decision, qtensor: QTensor) -> None:
    """Let the block compute with what will really run from here on."""
    path = decision.layer.name.removeprefix(f"{job.family.blocks}.{decision.layer.block}.")
    weight = qtensor.dequantize()
    if decision.layer.transposed:
        weight = weight.T.contiguous()
    module = block.get_submodule(path)
    module.weight = nn.Parameter(weight, requires_grad=False)


def _unpack(decision: Decision, tensors: Mapping[str, Tensor]) -> QTensor:
    layer, scheme = decision.layer, decision.scheme
    assert scheme is not None
    layout = format_named(scheme.format)
    names = {key: f"{layer.name}.{key}" for key in layout.tensor_names}
    packed = {key: tensors[name] for key, name in names.items() if name in tensors}
    return layout.unpack(packed, scheme.spec, layer.in_features)


def _ratio(delta: Tensor, weight: Tensor, hessian: Hessian | None) -> float | None:
    """Squared output error relative to the float layer's squared output."""
    if hessian is None or hessian.tokens == 0:
        return None
    return hessian.error_energy(delta) / max(hessian.error_energy(weight), 1e-30)
