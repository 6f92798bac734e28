"""Where the hidden states of a run are: in the fastest place for which there is memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch

from quantine.calibrate.setup import TOKENS_PER_BATCH
from quantine.core.device import CPU
from quantine.core.device_memory import free_memory
from quantine.core.memory_limit import memory_limit
from quantine.errors import DeviceMemoryError, PlanError
from quantine.run.job import Job
from quantine.run.peak import device_bytes, process_bytes
from quantine.run.working_set import (
    Place,
    Residence,
    hidden_bytes,
    may_resume,
    stopped_bytes,
)

DEFAULT_SHARE: Final = 0.25
"""Share of the memory that the process may use which calibration activations take by default."""
MARGIN: Final = 1.1
"""How much more memory than predicted is kept within ``max_ram``: what the allocator keeps for its
threads differs from run to run (6% measured)."""
DEVICE_SHARE: Final = 0.9
"""Share of a device's free memory that a run takes at most: gaps between tensors need the rest."""


@dataclass(frozen=True)
class Bounds:
    """Most bytes that a run may take.

    Attributes:
        memory: of the process, as it is predicted.
        activations: of these, what is kept of the calibration segments.
        device: of the device, if that is not the CPU; ``None`` where nothing is known of it.
        max_ram: GB that were asked for, if any.
        max_vram: GB that were asked for, if any.
    """

    memory: float
    activations: float
    device: int | None
    max_ram: float | None
    max_vram: float | None

    @classmethod
    def of(
        cls, device: torch.device, max_ram: float | None = None, max_vram: float | None = None
    ) -> Bounds:
        """What may be taken on ``device`` and of the memory of this machine.

        Args:
            device: where matrices are solved and blocks run.
            max_ram: see `quantine.run.quantize.quantize`.
            max_vram: see there.

        Raises:
            PlanError: a bound is negative, or not a number; or ``max_vram`` is given, but the
                device is the CPU.
        """
        for name, value in (("max_ram", max_ram), ("max_vram", max_vram)):
            if value is not None and not 0 <= value < math.inf:
                raise PlanError(f"{name} must not be negative, nor infinite, not {value} GB")
        if max_vram is not None and device == CPU:
            raise PlanError(
                "max_vram bounds the memory of a GPU, but the device is cpu: use max_ram"
            )
        free = free_memory(device)
        rooms = [] if free is None else [int(free * DEVICE_SHARE)]
        if max_vram is not None:
            rooms.append(round(max_vram * 1e9))
        asked = max_ram is not None
        memory = round(max_ram * 1e9 / MARGIN) if max_ram is not None else memory_limit()
        activations = math.inf if asked else memory * DEFAULT_SHARE
        return cls(memory, activations, min(rooms, default=None), max_ram, max_vram)


def residence_within(job: Job, bounds: Bounds, at_once: int | None = None) -> Residence:
    """Where hidden states of ``job`` are: the fastest place within ``bounds``.

    Where all exceed the memory of the machine, and no other bound was asked for, it is the fastest
    of those that take least.

    Args:
        job: the checked request.
        bounds: most bytes that it may take.
        at_once: segments that have to go through a block at once; ``None`` for any number.

    Raises:
        PlanError: the process needs more than ``max_ram``; says how much works.
        DeviceMemoryError: the device has less memory than the run needs, likewise.
    """
    places = [
        one for one in residences(job) if at_once in (None, job.segments_at_once(one.batch_tokens))
    ] or [Residence()]
    for one in places:
        device = device_bytes(job, one) or 0
        if (
            process_bytes(job, one) <= bounds.memory
            and _activations(job, one) <= bounds.activations
            and (bounds.device is None or device <= bounds.device)
        ):
            return one

    def taken(one: Residence) -> tuple[int, int]:
        return device_bytes(job, one) or 0, process_bytes(job, one)

    least = min(places, key=taken)
    on_device, in_process = taken(least)
    if bounds.device is not None and on_device > bounds.device:
        raise _too_small(job, on_device, bounds.device, bounds.max_vram)
    if bounds.max_ram is not None and in_process > bounds.memory:
        works = _gigabytes(math.ceil(MARGIN * in_process))
        raise PlanError(
            f"{job.source.name} takes at least {works} GB of memory, more than max_ram "
            f"{bounds.max_ram:g}: give {works} or more, fewer samples, or a smaller seqlen"
        )
    return least


def residences(job: Job) -> Iterator[Residence]:
    """Where hidden states of a run may be, the fastest first; the last takes least of everything.

    On the CPU all of them have the same batches, so that results do not depend on memory.
    """
    for one in _places(job):
        yield one
        yield replace(one, reads_ahead=False)


def _places(job: Job) -> Iterator[Residence]:
    if may_resume(job):
        yield Residence("device", True)
    yield Residence("device", False)
    if job.device == CPU:
        yield Residence("disk", False)
        return
    places: tuple[Place, ...] = ("memory", "disk")
    for place in places:
        tokens = TOKENS_PER_BATCH
        while tokens >= job.segment_length() and tokens:
            yield Residence(place, False, tokens)
            tokens //= 2
        yield Residence(place, False, 1)  # one segment at a time


def _activations(job: Job, residence: Residence) -> int:
    """Bytes of the calibration segments that are kept in the memory of the process."""
    inside: Place = "device" if job.device == CPU else "memory"
    hidden = hidden_bytes(job) if residence.hidden == inside else 0
    stopped = stopped_bytes(job) if residence.resumes and job.device == CPU else 0
    return hidden + stopped


def _too_small(job: Job, needed: int, room: int, max_vram: float | None) -> DeviceMemoryError:
    """The error for a device of ``room`` bytes where at least ``needed`` are needed."""
    least = _gigabytes(needed)
    if max_vram is not None and room == round(max_vram * 1e9):
        return DeviceMemoryError(
            f"{job.source.name} takes at least {least} GB on {job.device}, more than max_vram "
            f"{max_vram:g}: give {least} or more, a smaller seqlen, or device cpu"
        )
    return DeviceMemoryError(
        f"{job.source.name} takes at least {least} GB on {job.device}, where {room / 1e9:.2f} "
        f"of the free memory may be used: free some, or use a smaller seqlen, or device cpu"
    )


def _gigabytes(nbytes: int) -> str:
    """``nbytes`` in GB, rounded up, so that as many are enough."""
    return f"{math.ceil(nbytes / 1e7) / 100:.2f}"
