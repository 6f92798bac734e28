"""Predictions made before a run: bytes on disk, bits per weight, and peak memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch

from quantine.budget.probe import probe_segments
from quantine.calibrate.setup import TOKENS_PER_BATCH
from quantine.core.device import CPU
from quantine.core.device_memory import free_memory
from quantine.core.memory_limit import memory_limit
from quantine.core.process_memory import peak_memory
from quantine.core.spec import FLOAT16
from quantine.errors import DeviceMemoryError, PlanError
from quantine.families.layers import block_list
from quantine.formats.moving import MOVED_BYTES
from quantine.run.job import Job
from quantine.run.tuning_cost import tuning_bytes, tuning_seconds
from quantine.run.working_set import (
    FLOAT,
    Place,
    Residence,
    block_weights,
    hidden_bytes,
    may_resume,
    stopped_bytes,
    width,
    working_set,
)
from quantine.statistics.sensitivity_map import MAP_CELLS

DEFAULT_SHARE: Final = 0.25
"""Share of the memory that the process may use which calibration activations take by default."""
DEVICE_SHARE: Final = 0.9
"""Share of a device's free memory that a run takes at most: gaps between tensors need the rest."""
WORKSPACE: Final = 64_000_000
"""Bytes that a device's libraries for products of matrices take beside the tensors."""
GGUF_COPIES: Final = 1.5
"""Number of float32 copies of the model in memory while transformers dequantizes a GGUF file (1.3
measured)."""
LOCKED_COPIES: Final = 2
"""Number of copies of a block read ahead for CUDA: page-locked memory comes in powers of two."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take in memory and on disk; all sizes in bytes.

    Attributes:
        packed: size of the packed matrices.
        kept: size of everything else in the output's weight files.
        weights: number of quantized weights.
        activations: size of the hidden states between two blocks.
        residence: where hidden states will be, and how many go through a block at once.
        peak_memory: largest resident memory of the process, without what its allocator keeps of
            freed memory.
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
        max_ram: GB (1e9 bytes) that calibration activations may take in memory, see
            `quantine.run.quantize.quantize`.
        max_vram: GB that tensors may take on the device, see there.
        at_once: segments that go through a block at once on a device, as in a run that is
            continued; ``None`` chooses the most that fit.

    Raises:
        PlanError: ``max_ram`` or ``max_vram`` is negative, or not a number; or the latter is given,
            but the device is the CPU.
        DeviceMemoryError: the device has less memory than the run needs.
    """
    for name, value in (("max_ram", max_ram), ("max_vram", max_vram)):
        if value is not None and not 0 <= value < math.inf:
            raise PlanError(f"{name} must not be negative, nor infinite, not {value} GB")
    if max_vram is not None and job.device == CPU:
        raise PlanError("max_vram bounds the memory of a GPU, but the device is cpu: use max_ram")
    packed = sum(job.packed_bytes(decision) for decision in job.scheme_layers())
    kept = _kept_bytes(job)
    weights = sum(d.layer.weights for d in job.scheme_layers())
    limit = memory_limit() * DEFAULT_SHARE if max_ram is None else max_ram * 1e9
    room = _device_room(job.device, max_vram)
    residence = _residence(job, limit, room, at_once)
    most = max(working_set(job, residence), tuning_bytes(job))
    on_device = None if job.device == CPU else most + WORKSPACE
    if on_device is not None and room is not None and on_device > room:
        raise _too_small(job, on_device, room, max_vram)
    return Estimate(
        packed,
        kept,
        weights,
        hidden_bytes(job),
        residence,
        _peak(job, residence),
        on_device,
        room,
        disk_while_running(job, packed + kept),
        0 if job.segments is None else job.segments.numel(),
        tuning_seconds(job),
    )


def _residence(job: Job, limit: float, room: int | None, at_once: int | None) -> Residence:
    """Where hidden states are: the fastest place that fits, else the one that takes least.

    Args:
        limit: bytes that hidden states, and what stopped blocks keep, may take in memory.
        room: bytes that all tensors may take on the device; ``None`` knows no limit.
        at_once: see `estimate`.
    """
    if job.device == CPU:
        fits = hidden_bytes(job) <= limit
        resumes = may_resume(job) and hidden_bytes(job) + stopped_bytes(job) <= limit
        return Residence("device" if fits else "disk", resumes)
    found = Residence()
    for one in residences(job, limit):
        if at_once not in (None, job.segments_at_once(one.batch_tokens)):
            continue
        found = one
        if room is None or working_set(job, found) + WORKSPACE <= room:
            break
    return found


def residences(job: Job, limit: float) -> Iterator[Residence]:
    """Where hidden states of a run on a GPU may be, the fastest first."""
    if may_resume(job):
        yield Residence("device", True)
    yield Residence("device", False)
    place: Place = "memory" if hidden_bytes(job) <= limit else "disk"
    tokens = TOKENS_PER_BATCH
    while tokens >= job.segment_length() and tokens:
        yield Residence(place, False, tokens)
        tokens //= 2
    yield Residence(place, False, 1)  # one segment at a time


def _device_room(device: torch.device, max_vram: float | None) -> int | None:
    """Bytes that a run may take on ``device``; ``None`` for the CPU, and where nothing is known."""
    free = free_memory(device)
    bounds = [] if free is None else [int(free * DEVICE_SHARE)]
    if max_vram is not None:
        bounds.append(round(max_vram * 1e9))
    return min(bounds, default=None)


def _too_small(job: Job, needed: int, room: int, max_vram: float | None) -> DeviceMemoryError:
    """The error for a device of ``room`` bytes where at least ``needed`` are needed."""
    least = math.ceil(needed / 1e7) / 100
    if max_vram is not None and room == round(max_vram * 1e9):
        return DeviceMemoryError(
            f"{job.source.name} takes at least {least:.2f} GB on {job.device}, more than max_vram "
            f"{max_vram:g}: give {least:.2f} or more, a smaller seqlen, or device cpu"
        )
    return DeviceMemoryError(
        f"{job.source.name} takes at least {least:.2f} GB on {job.device}, where {room / 1e9:.2f} "
        f"of the free memory may be used: free some, or use a smaller seqlen, or device cpu"
    )


def disk_while_running(job: Job, output: int) -> int:
    """Most bytes on disk during a run.

    Args:
        job: the checked request.
        output: bytes of the weight files that it makes.
    """
    maps = MAP_CELLS**2 * 2 * len(job.scheme_layers())
    # Parts are tuned when all are there, and committed again.
    copies = 1 if job.plan.tune is None else 2
    return copies * (output + maps) + MOVED_BYTES + _scratch_bytes(job)


def _scratch_bytes(job: Job) -> int:
    """Bytes of files that are there only while the run lasts, at most."""
    # Hidden states, and a batch that is written before it replaces another.
    scratch = hidden_bytes(job) + min(hidden_bytes(job), FLOAT * TOKENS_PER_BATCH * width(job))
    if job.converts:
        scratch += sum(p.numel() for p in job.model.parameters()) * FLOAT
        if job.source.gguf_file is not None and len(job.source.gguf_parts) > 1:
            scratch += job.source.weight_bytes()  # all parts joined
    if job.plan.bits_per_weight is not None:
        blocks = len(block_list(job.model, job.family))
        length = job.segment_length()
        samples = 0 if job.segments is None else len(job.segments)
        scratch += blocks * probe_segments(samples, length) * length * width(job) * FLOAT
    return scratch


def _kept_bytes(job: Job) -> int:
    """Bytes of the tensors that are not quantized: matrices in 16 bit, other tensors in float32."""
    state = job.model.state_dict()
    blocks = range(len(block_list(job.model, job.family)))
    names = [*job.loose_names(), *(n for index in blocks for n in job.block_names(index))]
    return sum(state[name].numel() * (2 if state[name].ndim >= 2 else FLOAT) for name in names)


def _peak(job: Job, residence: Residence) -> int:
    """Peak resident memory in bytes: that of this process so far plus that of the largest step.

    Args:
        job: the checked request.
        residence: where hidden states are.
    """
    ahead = _stored_bytes(job) * block_weights(job)
    if job.device == CPU:
        steps = [working_set(job, residence) + ahead, tuning_bytes(job)]
    else:
        table = FLOAT * next(d.layer.weights for d in job.decisions if d.layer.role == "embedding")
        hidden = hidden_bytes(job) if residence.hidden == "memory" else 0
        results = max(job.packed_bytes(decision) for decision in job.scheme_layers())
        steps = [2 * table, LOCKED_COPIES * ahead + hidden + results]
    if job.source.gguf_file is not None:
        parameters = sum(p.numel() for p in job.model.parameters())
        steps.append(int(parameters * FLOAT * GGUF_COPIES))
    return peak_memory() + _replaced_bytes(job) + max(steps)


def _replaced_bytes(job: Job) -> int:
    """Bytes of the quantized token table, which stays in memory, decoded, while blocks run."""
    table = next(d for d in job.decisions if d.layer.role == "embedding")
    stays = table.scheme is not None and job.segments is not None and not job.plan.float_inputs
    return FLOAT * table.layer.weights if stays else 0


def _stored_bytes(job: Job) -> int:
    """Bytes of a number in the source's files, by its configuration."""
    dtype = None if job.source.gguf_file is not None else getattr(job.config, "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else FLOAT
