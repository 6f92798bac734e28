"""`quantize`, which quantizes a model block by block into an output directory."""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from quantine.budget.allocation import Allocation
from quantine.budget.probe import Budgeted, probe
from quantine.calibrate.segments import Calibration
from quantine.calibrate.sequential import CalibrationSetup, Sequential
from quantine.core.ambient import own_state
from quantine.core.process_memory import peak_memory, return_freed_memory, reuse_freed_memory
from quantine.errors import OutputError
from quantine.families.layers import block_list
from quantine.formats.directory import REPORT, is_finished, read_json
from quantine.plan.plan import Plan
from quantine.run.block import Adjustment, BlockRun, kept_tensors, restore_quantized
from quantine.run.estimate import Estimate, estimate
from quantine.run.job import Job
from quantine.run.layer import packed_tensors, solve, unpack
from quantine.run.output import output_files, report_of
from quantine.run.prepare import check_headers, check_output_path, prepare
from quantine.run.progress import Progress, Silent
from quantine.run.store import RunStore, check_identity, check_output, clear_remains
from quantine.run.tuned import OUTCOME, tuned_parts
from quantine.source.checkpoint import Checkpoint

PROBE: Final = "probe"
"""Name under which a run stores the table of `quantine.budget.probe.probe`."""


@dataclass(frozen=True)
class Result:
    """A finished output directory and its report.

    Attributes:
        path: the directory.
        report: the content of its ``quantine_report.json``.
    """

    path: Path
    report: dict[str, Any]


@own_state()
def quantize(
    model: str | Path,
    out: str | Path,
    plan: Plan | None = None,
    calibration: Calibration | None = None,
    *,
    resume: bool = False,
    max_ram: float | None = None,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
) -> Result:
    """Quantize a model into a directory that `quantine.load` and transformers open.

    Args:
        model: a directory, a ``.gguf`` file, a hub id or ``demo``; see
            `quantine.source.locate.locate`.
        out: output directory; must not exist, be empty, or hold an unfinished run to ``resume``.
        plan: what is done to which matrix; default is SpQR at 4 bits in groups of 16.
        calibration: text and sampling; default is the built-in text.
        resume: whether to continue the unfinished run in ``out``. The result has the same bytes
            (apart from measured times) as that of an uninterrupted run.
        max_ram: GB (1e9 bytes) that calibration activations may take in memory before they go to
            disk; default is a quarter of what the process may use, in a container of its limit.
        progress: receives the events of the run; default shows nothing.
        device: where matrices are solved and blocks run, by PyTorch's name.

    Returns:
        The output directory and its report.

    Raises:
        QuantineError: the model cannot be quantized so; the class says why, see `quantine.errors`.
            Errors are raised before work starts where they can be known by then.
    """
    started = time.perf_counter()
    job = prepare(model, plan or Plan.preset("spqr"), calibration or Calibration(), device)
    return carry_out(job, Path(out), resume, max_ram, progress or Silent(), started=started)


@own_state()
def carry_out(
    job: Job,
    out: Path,
    resume: bool = False,
    max_ram: float | None = None,
    progress: Progress | None = None,
    adjust: Adjustment | None = None,
    started: float | None = None,
) -> Result:
    """Carry out a checked request.

    Args:
        job: the checked request, from `quantine.run.prepare.prepare`.
        out: see `quantize`.
        resume: see `quantize`.
        max_ram: see `quantize`.
        progress: see `quantize`.
        adjust: changes the solved matrices of each block together; ``None`` leaves them as they
            are.
        started: the value of ``time.perf_counter()`` when the run began; now, if ``None``.

    Raises:
        QuantineError: as for `quantize`.
    """
    started = time.perf_counter() if started is None else started
    reuse_freed_memory()
    size = estimate(job, max_ram)
    check_output_path(out, resume, size.disk_while_running)
    store = RunStore(out)
    try:
        return _Run(job, store, resume, size, progress or Silent(), adjust).finished(started)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        said = "the disk is full: free some space and" if full else f"{error}: mend that and"
        raise OutputError(f"{out} cannot be written: {said} continue with --resume") from error
    finally:
        store.close()


@dataclass(frozen=True)
class _Run:
    """The steps of a run, and what all of them need."""

    job: Job
    store: RunStore
    resume: bool
    size: Estimate
    progress: Progress
    adjust: Adjustment | None

    def finished(self, started: float) -> Result:
        """Do all that is left to do, which may be nothing, and return the finished directory."""
        job, store, out = self.job, self.store, self.store.out
        self.progress.note(f"reading {job.source.name}; computing on {job.device}")
        gguf = job.source.gguf_file is not None
        identity = job.identity(job.source.gguf_digest() if gguf else job.checkpoint().digest())
        check_identity(out, identity)
        if not is_finished(out):
            store.lock()
            check_output(out, self.resume)  # again: another process may have come first
            check_identity(out, identity)
        if is_finished(out):
            clear_remains(out)
            self.progress.note(f"{out} is finished already")
            return Result(out, read_json(out / REPORT))
        store.open(identity)
        directory = self._converted() if gguf else job.source.directory
        checkpoint = job.checkpoint(directory)
        if gguf:
            check_headers(job, checkpoint)
            checkpoint.digest()
        parts = self._staged(checkpoint)
        if job.plan.tune is not None:
            parts = tuned_parts(job, checkpoint, store, parts, self.progress.note)
        report = report_of(job, identity, store.layer_reports(parts))
        if (outcome := store.recall(OUTCOME)) is not None:
            report["tuning"] = outcome
        report["run"] = {
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_bytes": peak_memory(),
        }
        files = output_files(job, directory, report, store.entries(parts))
        store.finish(parts, files, report)
        self.progress.finish(report)
        return Result(out, report)

    def _converted(self) -> Path:
        """Convert a GGUF model to float32 safetensors, which can be read one block at a time."""
        directory = self.store.scratch / "source"
        model = self.job.source.float_model(torch.float32, self.store.scratch)
        model.save_pretrained(directory, max_shard_size="2GB")
        self.job.tokenizer.save_pretrained(directory)
        return directory

    def _staged(self, checkpoint: Checkpoint) -> list[str]:
        """Commit every part of the output that is missing; returns all parts in file order."""
        loose = self._stage_loose(checkpoint)
        outside = self._stage_outside(checkpoint)
        count = len(block_list(self.job.model, self.job.family))
        blocks = [f"block-{index:05}" for index in range(count)]
        done = sum(self.store.is_committed(part) for part in blocks)
        self.progress.start(count, done)
        if done < count:
            self._stage_blocks(checkpoint, blocks)
        return [*outside, *loose, *blocks]

    def _stage_blocks(self, checkpoint: Checkpoint, parts: list[str]) -> None:
        """Quantize and commit the blocks that no earlier process committed."""
        setup = self._setup(checkpoint)
        allocation = None if setup is None else self._allocation(checkpoint, setup)
        sequential = None if setup is None else Sequential(setup)
        for index, part in enumerate(parts):
            if sequential is not None:
                sequential.load(index)
            if self.store.is_committed(part):
                self._restore(index, part, allocation)
            else:
                run = BlockRun(
                    self.job,
                    checkpoint,
                    sequential,
                    index,
                    allocation,
                    self.progress,
                    self.adjust,
                )
                result = run.quantize()
                self.store.commit(part, result.tensors, result.reports, result.maps)
            if sequential is not None:
                sequential.advance(index)
                sequential.release(index)
            return_freed_memory()
            self.progress.block(index)

    def _restore(self, index: int, part: str, allocation: Allocation | None) -> None:
        """Continue from a block that an earlier process committed."""
        reports = self.store.layer_reports([part])
        restore_quantized(self.job, self.store.tensors(part), index, reports)
        if allocation is not None:
            for report in reports:
                allocation.spend(report["name"], report["bytes"])

    def _stage_loose(self, checkpoint: Checkpoint) -> list[str]:
        """Commit each float tensor outside of blocks as a part; returns the names of the parts."""
        parts = self.job.loose_names()
        for name in parts:
            if not self.store.is_committed(name):
                self.store.commit(name, kept_tensors(self.job, checkpoint, [name]), [])
        return parts

    def _stage_outside(self, checkpoint: Checkpoint) -> list[str]:
        """Quantize and commit embedding and head, where the plan says so; returns their names."""
        outside = [d for d in self.job.scheme_layers() if d.layer.role != "block"]
        for decision in outside:
            layer = decision.layer
            if not self.store.is_committed(layer.name):
                solved = solve(decision, self.job.float_weight(checkpoint, layer), None)
                self.store.commit(layer.name, packed_tensors(solved), [solved.report()])
        return [decision.layer.name for decision in outside]

    def _setup(self, checkpoint: Checkpoint) -> CalibrationSetup | None:
        """The calibration segments and the model they run through; ``None`` without calibration.

        If the embedding is quantized, segments are embedded with its quantized table.
        """
        job = self.job
        if job.segments is None:
            return None
        replaced = {}
        for decision in job.scheme_layers():
            if decision.layer.role == "embedding" and not job.plan.float_inputs:
                packed = self.store.tensors(decision.layer.name)
                table = unpack(decision, packed).dequantize()
                replaced[decision.layer.stored_name] = table
        spill = self.store.scratch / "activations" if self.size.spills else None
        return job.calibration_setup(checkpoint, spill, replaced, self.size.resumes)

    def _allocation(self, checkpoint: Checkpoint, setup: CalibrationSetup) -> Allocation | None:
        """The budget of bits, for plans that have one; it is probed once per run, see `PROBE`."""
        job, plan = self.job, self.job.plan
        if plan.bits_per_weight is None:
            return None
        decisions = [d for d in job.scheme_layers() if d.by_budget]
        table = self.store.recall(PROBE)
        if table is None:
            read = partial(job.read, checkpoint)
            budgeted = [Budgeted(d.layer, d.choices) for d in decisions]
            scratch, seed = self.store.scratch / "probe", job.calibration.seed
            table = probe(setup, budgeted, job.observed, read, scratch, seed, self.progress.note)
            self.store.remember(PROBE, table)
        weights = sum(decision.layer.weights for decision in decisions)
        return Allocation(plan.name, plan.bits_per_weight, weights, table)
