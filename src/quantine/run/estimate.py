"""Predictions made before a run: bytes on disk, bits per weight, and peak memory."""

from __future__ import annotations

from dataclasses import dataclass

from quantine.budget.probe import probe_segments
from quantine.calibrate.setup import TOKENS_PER_BATCH
from quantine.core.process_memory import peak_memory
from quantine.core.spec import FLOAT16
from quantine.families.layers import block_list
from quantine.formats.directory import copied_files
from quantine.formats.moving import MOVED_BYTES
from quantine.run.job import Job
from quantine.run.peak import device_bytes, process_bytes
from quantine.run.residence import Bounds, residence_within
from quantine.run.tuning_cost import tuning_seconds
from quantine.run.working_set import (
    FLOAT,
    Residence,
    coupling_bytes,
    hidden_bytes,
    state_bytes,
    width,
)
from quantine.statistics.sensitivity_map import MAP_CELLS


@dataclass(frozen=True)
class Estimate:
    """What a run will take in memory and on disk; all sizes in bytes.

    Attributes:
        packed: size of the packed matrices.
        kept: size of everything else in the output's weight files.
        weights: number of quantized weights.
        activations: size of the hidden states between two blocks.
        residence: where hidden states will be, and how many go through a block at once.
        peak_memory: largest resident memory of the process.
        device_memory: most bytes that tensors and libraries take on the device; ``None`` where that
            is the CPU, whose memory is that of the process.
        device_limit: most bytes that they may take there; ``None`` where nothing is known of it.
        disk_while_running: most disk space used during the run, the finished output included.
        tokens: number of calibration tokens.
        tuning_seconds: what tuning takes, roughly; ``None`` without it, and for a device that is
            not here.
    """

    packed: int
    kept: int
    weights: int
    activations: int
    residence: Residence
    peak_memory: int
    device_memory: int | None
    device_limit: int | None
    disk_while_running: int
    tokens: int
    tuning_seconds: float | None = None

    @property
    def spills(self) -> bool:
        """Whether hidden states go to disk, because they exceed the memory they may take."""
        return self.residence.hidden == "disk"

    @property
    def bits_per_weight(self) -> float:
        """Packed bits per quantized weight; 16 if nothing is quantized."""
        return self.packed * 8 / self.weights if self.weights else float(FLOAT16)

    @property
    def output(self) -> int:
        """Size of the output's weight files in bytes, without their headers."""
        return self.packed + self.kept


def estimate(
    job: Job,
    max_ram: float | None = None,
    max_vram: float | None = None,
    at_once: int | None = None,
) -> Estimate:
    """Predict what a run will take, and choose where its hidden states are.

    Args:
        job: the checked request, whose device need not be there.
        max_ram: GB (1e9 bytes) that the process may take, see `quantine.run.quantize.quantize`.
        max_vram: GB that tensors may take on the device, see there.
        at_once: segments that go through a block at once on a device, as in a run that is
            continued; ``None`` chooses the most that fit.

    Raises:
        PlanError: ``max_ram`` or ``max_vram`` is negative, or not a number; or the latter is given,
            but the device is the CPU; or the run needs more than ``max_ram``.
        DeviceMemoryError: the device has less memory than the run needs.
    """
    bounds = Bounds.of(job.device, max_ram, max_vram)
    residence = residence_within(job, bounds, at_once)
    packed = sum(job.packed_bytes(decision) for decision in job.scheme_layers())
    kept = _kept_bytes(job)
    weights = sum(d.layer.weights for d in job.scheme_layers())
    return Estimate(
        packed,
        kept,
        weights,
        hidden_bytes(job),
        residence,
        max(peak_memory(), process_bytes(job, residence)),
        device_bytes(job, residence),
        bounds.device,
        _disk_while_running(job, packed + kept),
        0 if job.segments is None else job.segments.numel(),
        tuning_seconds(job),
    )


def _disk_while_running(job: Job, output: int) -> int:
    """Most bytes on disk during a run.

    Args:
        job: the checked request.
        output: bytes of the weight files that it makes.
    """
    # Parts are tuned when all are there, and committed again.
    copies = 1 if job.plan.tune is None else 2
    # Hidden states are gone when parts are moved.
    return (
        copies * (output + _maps_bytes(job))
        + _tuned_blocks_bytes(job)
        + sum(coupling_bytes(job)) * FLOAT16 // 8 // FLOAT
        + max(_scratch_bytes(job), _moved_bytes(job))
        + _copied_bytes(job)
    )


def _moved_bytes(job: Job) -> int:
    """Bytes of the largest piece that is on disk twice while parts are moved, at most."""
    packed = max((job.packed_bytes(decision) for decision in job.scheme_layers()), default=0)
    return min(MOVED_BYTES, max(packed, *_kept_sizes(job)))


def _tuned_blocks_bytes(job: Job) -> int:
    """Bytes of what blocks are tuned to, at most: a byte for each code, 4 for each other number.

    Files hold the other numbers in 2 bytes at least, or codes of them.
    """
    tuning = job.plan.tune
    if tuning is None or not tuning.block_steps:
        return 0
    blocks = [decision for decision in job.scheme_layers() if decision.layer.role == "block"]
    return sum(d.layer.weights + 2 * job.packed_bytes(d) for d in blocks)


def _maps_bytes(job: Job) -> int:
    """Bytes of the sensitivity maps, which methods have that use calibration inputs."""
    layers = [decision.layer for decision in job.scheme_layers() if decision.needs_inputs]
    return sum(
        FLOAT16 // 8 * min(layer.out_features, MAP_CELLS) * min(layer.in_features, MAP_CELLS)
        for layer in layers
    )


def _copied_bytes(job: Job) -> int:
    """Bytes of the source's small files that the output has, too."""
    return sum(file.stat().st_size for file in copied_files(job.source.directory).values())


def _scratch_bytes(job: Job) -> int:
    """Bytes of files that are there only while blocks are worked on, at most."""
    # Hidden states, and a batch that is written before it replaces another.
    scratch = hidden_bytes(job) + min(hidden_bytes(job), FLOAT * TOKENS_PER_BATCH * width(job))
    length, blocks = job.segment_length(), len(block_list(job.model, job.family))
    samples = 0 if job.segments is None else len(job.segments)
    if job.plan.loss_weights:  # gone when a budget's begin
        return scratch + (blocks + 1) * state_bytes(job)
    if job.plan.bits_per_weight is not None:
        probed = probe_segments(samples, length, weighted=False)
        scratch += blocks * probed * length * width(job) * FLOAT
    return scratch


def _kept_bytes(job: Job) -> int:
    """Bytes of the tensors that are not quantized."""
    return sum(_kept_sizes(job))


def _kept_sizes(job: Job) -> list[int]:
    """Bytes of each tensor that is not quantized: matrices in 16 bit, others in float32."""
    state = job.model.state_dict()
    blocks = range(len(block_list(job.model, job.family)))
    names = [*job.loose_names(), *(n for index in blocks for n in job.block_names(index))]
    return [state[name].numel() * (2 if state[name].ndim >= 2 else FLOAT) for name in names]
