"""Peak memory of a run, predicted from the configuration alone: the process's and the device's."""

from __future__ import annotations

from typing import Final

import torch

from quantine.core.device import CPU
from quantine.core.process_memory import KEPT_FREE, peak_memory, resident_memory
from quantine.run.job import Job
from quantine.run.tuning_cost import tuning_bytes
from quantine.run.working_set import (
    COUPLED_COPIES,
    FLOAT,
    Residence,
    block_coupling_bytes,
    block_weights,
    hidden_bytes,
    working_set,
)

PROGRAM_STEP: Final = 2**26
"""Bytes that the program's own memory is rounded up to, so that processes agree about it."""
WORKSPACE: Final = 64_000_000
"""Bytes that a device's libraries for products of matrices take beside the tensors."""
GAPS: Final = 3 * KEPT_FREE // 2
"""Bytes of freed memory between tensors that the allocator still holds, at most (measured)."""
TENSORS_FOR_GAPS: Final = 3
"""Bytes of tensors, at least, that leave one byte of such gaps (measured)."""
LOCKED_COPIES: Final = 2
"""Number of copies of a block read ahead for CUDA: page-locked memory comes in powers of two."""


def device_bytes(job: Job, residence: Residence) -> int | None:
    """Most bytes that tensors and libraries take on the device; ``None`` where that is the CPU.

    Args:
        job: the checked request.
        residence: where its hidden states are.
    """
    if job.device == CPU:
        return None
    return max(working_set(job, residence), tuning_bytes(job)) + WORKSPACE


def process_bytes(job: Job, residence: Residence) -> int:
    """Peak resident memory of the process, with what its allocator keeps of freed memory.

    What this process holds already counts.

    Args:
        job: the checked request.
        residence: where its hidden states are.
    """
    ahead = _stored_bytes(job) * block_weights(job) * residence.reads_ahead
    if job.device == CPU:
        steps = [working_set(job, residence) + ahead, tuning_bytes(job)]
    else:
        table = FLOAT * next(d.layer.weights for d in job.decisions if d.layer.role == "embedding")
        hidden = hidden_bytes(job) if residence.hidden == "memory" else 0
        results = max(job.packed_bytes(decision) for decision in job.scheme_layers())
        coupled = COUPLED_COPIES * block_coupling_bytes(job)
        steps = [2 * table, LOCKED_COPIES * ahead + hidden + results + coupled]
    before = -(-(resident_memory() or peak_memory()) // PROGRAM_STEP) * PROGRAM_STEP
    most = max(steps) + _replaced_bytes(job)
    most += min(GAPS, most // TENSORS_FOR_GAPS)
    return before + most


def _replaced_bytes(job: Job) -> int:
    """Bytes of the quantized token table, which stays in memory, decoded, while blocks run."""
    table = next(d for d in job.decisions if d.layer.role == "embedding")
    stays = table.scheme is not None and job.segments is not None and not job.plan.float_inputs
    return FLOAT * table.layer.weights if stays else 0


def _stored_bytes(job: Job) -> int:
    """Bytes of a number as it is read: that of the source's files, by its configuration."""
    if job.rotated is not None:
        return FLOAT
    dtype = None if job.source.gguf_file is not None else getattr(job.config, "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else FLOAT
