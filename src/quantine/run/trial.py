"""One block of a run is really quantized, to predict what the whole run takes."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from quantine.calibrate.block_loader import BlockLoader
from quantine.calibrate.sequential import Sequential
from quantine.core.ambient import own_state, repeatable
from quantine.core.device_memory import bounded
from quantine.core.process_memory import peak_memory, reuse_freed_memory
from quantine.errors import OutputError, PlanError
from quantine.families.layers import block_list
from quantine.run.estimate import estimate
from quantine.run.job import Job
from quantine.run.progress import Silent
from quantine.run.stages import Stages
from quantine.run.store import RunStore
from quantine.source.read_record import ReadRecord


@dataclass(frozen=True)
class Trial:
    """What a run will take, by what one of its blocks took.

    Attributes:
        block: number of the block, from 0.
        blocks: number of blocks of the model.
        block_seconds: time that the block took, from reading its weights to its outputs.
        seconds: time that the whole run will take, without moving the parts at its end.
        peak_memory: largest resident memory of the process so far, in bytes; later blocks of the
            same size take no more.
        output: bytes of the weight files.
        disk_while_running: most bytes on disk during the run, the output included.
    """

    block: int
    blocks: int
    block_seconds: float
    seconds: float
    peak_memory: int
    output: int
    disk_while_running: int


@own_state()
def try_block(
    job: Job,
    max_ram: float | None = None,
    max_vram: float | None = None,
    scratch: Path | None = None,
    started: float | None = None,
) -> Trial:
    """Quantize the second block of a model, and what is outside of blocks, in a scratch directory.

    The block reads what enters the first one, which takes the same time.

    Args:
        job: the checked request, whose device is here.
        max_ram: see `quantine.run.quantize.quantize`.
        max_vram: see there.
        scratch: directory in which the scratch directory is made and removed; ``None`` takes the
            system's.
        started: the value of ``time.perf_counter()`` when the job began to be prepared, which the
            run takes, too; now, if ``None``.

    Raises:
        PlanError: the plan has a budget, whose search one block says nothing of.
        QuantineError: as for `quantine.run.quantize.quantize`.
    """
    if job.plan.loss_weights:
        raise PlanError(
            "loss_weights take gradients through all blocks before the first is quantized, which "
            "--probe cannot foresee: probe a plan without them"
        )
    if job.plan.compensate:
        raise PlanError(
            "compensate follows errors through all blocks, of which --probe tries one: probe a "
            "plan without it"
        )
    if job.plan.bits_per_weight is not None:
        raise PlanError(
            "a budget is searched over all blocks before the first is quantized, which --probe "
            "cannot foresee: probe a plan without bits_per_weight"
        )
    began = time.perf_counter() if started is None else started
    reuse_freed_memory()
    size = estimate(job, max_ram, max_vram)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="quantine-probe-", dir=scratch) as name,
            repeatable(job.device),
            bounded(job.device, size.device_limit),
        ):
            store = RunStore(Path(name))
            store.open({})
            stages = Stages(job, store, job.checkpoint(ReadRecord()), size, Silent())
            return _measured(stages, began)
    except OSError as error:
        raise OutputError(f"a block cannot be tried: {error}") from error


def _measured(stages: Stages, began: float) -> Trial:
    """Run the stages that a run has once, and one block of those that it has often."""
    job, store, size = stages.job, stages.store, stages.size
    outside, setup = stages.stage_outside(), stages.setup()
    sequential = None if setup is None else Sequential(setup)
    count = len(block_list(job.model, job.family))
    index = min(1, count - 1)
    with BlockLoader(job.model, job.family, stages.checkpoint, job.device) as loader:
        entered = time.perf_counter()
        ahead = size.residence.reads_ahead
        loader.load(index, min(index + 1, count - 1) if ahead else None)
        stages.stage_block("block", index, sequential)
        if sequential is not None:
            sequential.advance(index)
        loader.release(index)
    block_seconds = time.perf_counter() - entered
    times = _in_blocks(job) / _in_blocks(job, index)
    output = round(store.nbytes(outside) + store.nbytes(["block"]) * times)
    copies = 1 if job.plan.tune is None else 2  # tuned parts are committed again
    store.close()
    return Trial(
        block=index,
        blocks=count,
        block_seconds=block_seconds,
        seconds=entered - began + block_seconds * times + (size.tuning_seconds or 0.0),
        peak_memory=peak_memory(),
        output=output,
        disk_while_running=size.disk_while_running + copies * (output - size.output),
    )


def _in_blocks(job: Job, index: int | None = None) -> int:
    """Number of weights in the matrices of all blocks, or of the one with that number."""
    layers = [decision.layer for decision in job.decisions if decision.layer.block is not None]
    return sum(layer.weights for layer in layers if index in (None, layer.block))
