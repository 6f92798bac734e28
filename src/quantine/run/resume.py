"""`resume`, which continues the run in a directory by what the directory says of it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from quantine.core.ambient import own_state
from quantine.ranks.ranks import ALONE, Ranks
from quantine.run.prepare import prepare
from quantine.run.progress import Progress
from quantine.run.quantize import Result, carry_out
from quantine.run.request import Request


@own_state()
def resume(
    out: Path,
    request: Request,
    max_ram: float | None = None,
    max_vram: float | None = None,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
    ranks: Ranks = ALONE,
) -> Result:
    """Continue the run in ``out``.

    Args:
        out: the directory.
        request: what was asked of it, from `quantine.run.request.stored_request`; with other places
            of model and text, if these have moved.
        max_ram: see `quantine.run.quantize.quantize`.
        max_vram: see there.
        progress: see there.
        device: see there.
        ranks: see there.

    Raises:
        QuantineError: as for `quantine.run.quantize.quantize`.
    """
    started = time.perf_counter()
    job = prepare(request.model, request.plan, request.calibration, device)
    # Results call the model what the first command called it, wherever it is now.
    job = replace(job, source=replace(job.source, name=request.name), ranks=ranks)
    return carry_out(job, out, True, max_ram, max_vram, progress, started=started)
