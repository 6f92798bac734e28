"""`quantize`, which quantizes a model block by block into an output directory."""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantine.calibrate.segments import Calibration
from quantine.core.ambient import own_state, repeatable
from quantine.core.device import described
from quantine.core.device_memory import bounded, forget_peak_device_memory, peak_device_memory
from quantine.core.process_memory import peak_memory, reuse_freed_memory
from quantine.errors import DeviceMemoryError, OutputError, PlanError, cut
from quantine.formats.directory import REPORT, is_finished, read_json
from quantine.formats.imported import second_rounding
from quantine.plan.plan import Plan
from quantine.ranks.ranks import ALONE, Ranks
from quantine.run.block import Adjustment
from quantine.run.block_costs import stored_costs
from quantine.run.estimate import Estimate, estimate
from quantine.run.job import Job
from quantine.run.output import output_files, report_of
from quantine.run.prepare import check_output_path, prepare
from quantine.run.progress import Progress, Silent
from quantine.run.rank_checks import check_ranks, check_sight
from quantine.run.request import REQUEST, request_of
from quantine.run.stages import Stages
from quantine.run.store import (
    AT_ONCE,
    RunStore,
    check_identity,
    check_output,
    clear_remains,
    stored_identity,
)
from quantine.run.tuned import OUTCOME, tuned_parts
from quantine.run.used_source import check_record, check_source, recorded_source
from quantine.source.checkpoint import Checkpoint
from quantine.source.read_record import ReadRecord


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
    ranks: Ranks = ALONE,
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
        max_ram: GB (1e9 bytes) that the process may take. Where it does not suffice for everything,
            blocks are not read ahead, compute again what they could keep, and hidden states go to
            disk; too little is refused. Default is what the process may use, in a container its
            limit, of which activations take at most a quarter.
        max_vram: GB that the run may take on ``device``, if that is not the CPU; default is nine
            tenths of what is free. Where it does not suffice for everything, hidden states move to
            the CPU's memory or to disk, and fewer tokens go through a block at once.
        progress: receives the events of the run; default shows nothing.
        device: where matrices are solved and blocks run, by PyTorch's name; ``"auto"`` is a GPU of
            NVIDIA where there is one, else the CPU.
        ranks: the processes that share the run, from `quantine.ranks.start.started`. All call this
            with the same arguments, their devices and ``progress`` apart, and see the same ``out``.

    Returns:
        The output directory and its report.

    Raises:
        QuantineError: the model cannot be quantized so; the class says why, see `quantine.errors`.
            Errors are raised before work starts where they can be known by then.
    """
    started = time.perf_counter()
    plan, calibration = plan or Plan.preset("spqr"), calibration or Calibration()
    job = replace(prepare(model, plan, calibration, device), ranks=ranks)
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
    at_once = job.ranks.of_first(lambda: _at_once_before(job, out))
    size = estimate(job, max_ram, max_vram, at_once)
    check_ranks(job)
    if adjust is not None and job.ranks.count > 1:
        raise PlanError("adjustments of blocks are not shared by ranks: run one process")
    job.ranks.agree(lambda: job.identity(None, size.residence.batch_tokens))
    if job.ranks.first:
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


def _at_once_before(job: Job, out: Path) -> int | None:
    """Segments that go through a block at once in the run that is in ``out``, if there is one.

    The device's free memory has a say in that number and must not end a run that is continued.
    """
    try:
        found = stored_identity(out)
    except OSError:  # what is wrong with the path is said where it is checked
        return None
    if found is None:
        return None
    kept = found.get(AT_ONCE, "")
    return int(kept) if kept.isdecimal() else job.segments_at_once()


def _fewer_at_once(job: Job, size: Estimate) -> str | None:
    """What to say where the device's memory decides on bytes of the result, if it does."""
    usual, now = job.segments_at_once(), job.segments_at_once(size.residence.batch_tokens)
    if now == usual:
        return None
    return (
        f"memory of {job.device}: {now} instead of {usual} segments go through a block at once, so "
        "sums round otherwise; the report keeps the number, and so does --resume"
    )


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
        begun = job.ranks.of_first(self._begun)
        if begun is None:
            return Result(out, read_json(out / REPORT))
        identity, record = begun
        check_sight(job.ranks, out, identity)
        forget_peak_device_memory(job.device)
        checkpoint = job.checkpoint(record)
        stages = Stages(job, store, checkpoint, self.size, self.progress, self.adjust)
        parts = stages.all_committed()
        report = job.ranks.of_first(lambda: self._ended(checkpoint, identity, parts, started))
        self.progress.finish(report)
        return Result(out, report)

    def _begun(self) -> tuple[dict[str, str], ReadRecord] | None:
        """Begin the run, or go on with it, in the one process that writes.

        Returns:
            The identity of the run, and what it has read of its source; ``None`` if it is finished.
        """
        job, store, out = self.job, self.store, self.store.out
        self.progress.note(f"reading {job.source.name}; computing on {described(job.device)}")
        for said in (second_rounding(job.source), _fewer_at_once(job, self.size)):
            if said is not None:
                self.progress.note(said)
        identity = self._checked_identity()
        record = recorded_source(out)
        check_source(out, job.checkpoint(record))
        if not is_finished(out):
            store.lock()
            check_output(out, self.resume)  # again: another process may have come first
            identity = self._checked_identity()
            check_record(out, record)
        if is_finished(out):
            clear_remains(out)
            self.progress.note(f"{out} is finished already")
            return None
        store.open(identity)
        if store.recall(REQUEST) is None:
            store.remember(REQUEST, request_of(job).as_plain())
        return identity, record

    def _ended(
        self, checkpoint: Checkpoint, identity: dict[str, str], parts: list[str], started: float
    ) -> dict[str, Any]:
        """Make the final files of the committed parts; returns the report."""
        job, store = self.job, self.store
        if job.plan.tune is not None:
            with job.times.stage("tuning"):
                parts = tuned_parts(job, checkpoint, store, parts, self.progress.note)
        identity.setdefault("weights", checkpoint.digest())
        report = report_of(job, identity, store.layer_reports(parts))
        if (outcome := store.recall(OUTCOME)) is not None:
            report["tuning"] = outcome
        on_device = peak_device_memory(job.device)
        report["run"] = {
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_bytes": peak_memory(),
            **({} if on_device is None else {"peak_device_memory_bytes": on_device}),
            **({} if job.ranks.count == 1 else {"ranks": job.ranks.count}),
            "stages": job.times.as_plain(),
            "blocks": stored_costs(store),
        }
        files = output_files(job, store.scratch, report, store.entries(parts))
        store.finish(parts, files, report)
        return report

    def _checked_identity(self) -> dict[str, str]:
        """The identity of the run, which is also that of the run in the directory, if any.

        Weights are not part of it while they are still to be read.

        Raises:
            ResumeMismatch: the run in the directory has another.
        """
        out = self.store.out
        weights = self.job.checkpoint().digest() if is_finished(out) else None
        identity = self.job.identity(weights, self.size.residence.batch_tokens)
        check_identity(out, identity)
        return identity
