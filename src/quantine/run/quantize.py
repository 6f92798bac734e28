"""`quantize`, which quantizes a model block by block into an output directory."""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import torch

from quantine.budget.allocation import Allocation
from quantine.budget.probe import Budgeted, probe
from quantine.calibrate.block_loader import BlockLoader
from quantine.calibrate.segments import Calibration
from quantine.calibrate.sequential import CalibrationSetup, Sequential
from quantine.core.ambient import own_state, repeatable
from quantine.core.device import CPU, described
from quantine.core.device_memory import bounded, forget_peak_device_memory, peak_device_memory
from quantine.core.process_memory import peak_memory, return_freed_memory, reuse_freed_memory
from quantine.errors import DeviceMemoryError, OutputError, cut
from quantine.families.layers import block_list
from quantine.formats.directory import REPORT, is_finished, read_json
from quantine.formats.imported import second_rounding, write_floats
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
    max_vram: float | None = None,
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
        max_vram: GB that the run may take on ``device``, if that is not the CPU; default is nine
            tenths of what is free. Where it does not suffice for everything, hidden states move to
            the CPU's memory or to disk, and fewer tokens go through a block at once.
        progress: receives the events of the run; default shows nothing.
        device: where matrices are solved and blocks run, by PyTorch's name; ``"auto"`` is a GPU of
            NVIDIA where there is one, else the CPU.

    Returns:
        The output directory and its report.

    Raises:
        QuantineError: the model cannot be quantized so; the class says why, see `quantine.errors`.
            Errors are raised before work starts where they can be known by then.
    """
    started = time.perf_counter()
    job = prepare(model, plan or Plan.preset("spqr"), calibration or Calibration(), device)
    out = Path(out)
    return carry_out(job, out, resume, max_ram, max_vram, progress or Silent(), started=started)


@own_state()
def carry_out(
    job: Job,
    out: Path,
    resume: bool = False,
    max_ram: float | None = None,
    max_vram: float | None = None,
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
        max_vram: see `quantize`.
        progress: see `quantize`.
        adjust: changes the solved matrices of each block together; ``None`` leaves them as they
            are.
        started: the value of ``time.perf_counter()`` when the run began; now, if ``None``.

    Raises:
        QuantineError: as for `quantize`.
    """
    started = time.perf_counter() if started is None else started
    reuse_freed_memory()
    size = estimate(job, max_ram, max_vram)
    check_output_path(out, resume, size.disk_while_running)
    store = RunStore(out)
    run = _Run(job, store, resume, size, progress or Silent(), adjust)
    try:
        with repeatable(job.device), bounded(job.device, size.device_limit):
            return run.finished(started)
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"{job.device} ran out of memory: continue with --resume and a smaller --max-vram, "
            f"or free some ({cut(error)})"
        ) from error
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
        self.progress.note(f"reading {job.source.name}; computing on {described(job.device)}")
        rounded = second_rounding(job.source)
        if rounded is not None:
            self.progress.note(rounded)
        gguf = job.source.gguf_file is not None
        digest = job.source.gguf_digest() if gguf else job.checkpoint().digest()
        identity = job.identity(digest, self.size.residence.batch_tokens)
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
        forget_peak_device_memory(job.device)
        directory = self._converted() if job.converts else job.source.directory
        checkpoint = job.checkpoint(directory)
        if job.converts:
            check_headers(job, checkpoint)
            checkpoint.digest()
        parts = self._staged(checkpoint)
        if job.plan.tune is not None:
            parts = tuned_parts(job, checkpoint, store, parts, self.progress.note)
        report = report_of(job, identity, store.layer_reports(parts))
        if (outcome := store.recall(OUTCOME)) is not None:
            report["tuning"] = outcome
        on_device = peak_device_memory(job.device)
        report["run"] = {
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_bytes": peak_memory(),
            **({} if on_device is None else {"peak_device_memory_bytes": on_device}),
        }
        files = output_files(job, directory, report, store.entries(parts))
        store.finish(parts, files, report)
        self.progress.finish(report)
        return Result(out, report)

    def _converted(self) -> Path:
        """Convert the model to float32 safetensors, which can be read one block at a time."""
        directory = self.store.scratch / "source"
        if self.job.source.gguf_file is None:
            write_floats(self.job.source, directory)
            return directory
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
        job, setup = self.job, self._setup(checkpoint)
        missing = [i for i, part in enumerate(parts) if not self.store.is_committed(part)]
        # Calibration runs through finished blocks, too.
        indices = missing if setup is None else list(range(len(parts)))
        with BlockLoader(job.model, job.family, checkpoint, job.device) as loader:
            allocation = None if setup is None else self._allocation(checkpoint, setup, loader)
            sequential = None if setup is None else Sequential(setup)
            for index, then in zip_longest(indices, indices[1:]):
                loader.load(index, then)
                if index in missing:
                    self._stage_block(checkpoint, parts[index], index, sequential, allocation)
                else:
                    self._restore(index, parts[index], allocation)
                if sequential is not None:
                    sequential.advance(index)
                loader.release(index)
                return_freed_memory()
                self.progress.block(index)

    def _stage_block(
        self,
        checkpoint: Checkpoint,
        part: str,
        index: int,
        sequential: Sequential | None,
        allocation: Allocation | None,
    ) -> None:
        """Quantize and commit a block whose weights are loaded."""
        run = BlockRun(
            self.job, checkpoint, sequential, index, allocation, self.progress, self.adjust
        )
        result = run.quantize()
        self.store.commit(part, result.tensors, result.reports, result.maps)

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
                packed = {name: tensor.to(job.device) for name, tensor in packed.items()}
                # A device would hold the table during the whole run.
                table = unpack(decision, packed).dequantize().cpu()
                replaced[decision.layer.stored_name] = table
        spill = self.store.scratch / "activations" if self.size.spills else None
        residence = self.size.residence
        kept_on = CPU if residence.hidden == "memory" else None
        return job.calibration_setup(
            checkpoint, spill, replaced, residence.resumes, kept_on, residence.batch_tokens
        )

    def _allocation(
        self, checkpoint: Checkpoint, setup: CalibrationSetup, loader: BlockLoader
    ) -> Allocation | None:
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
            note = self.progress.note
            table = probe(setup, loader, budgeted, job.observed, read, scratch, seed, note)
            self.store.remember(PROBE, table)
        weights = sum(decision.layer.weights for decision in decisions)
        return Allocation(plan.name, plan.bits_per_weight, weights, table)
