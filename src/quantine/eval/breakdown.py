"""Where the time of a token goes that the native decoder writes, stage by stage.

Stages are timed while they run one after another, so that what they wait for each other, and for
threads, is in them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantine.core.ambient import own_state
from quantine.core.device import CPU
from quantine.errors import BackendUnavailable, PlanError
from quantine.eval.speed import memory_speed
from quantine.eval.text_speed import DECODED, decode_tokens, fitting, prompt_of, seconds, timed
from quantine.kernels import backend
from quantine.kernels.threads import pool
from quantine.runtime.decoder import Decoder, decoder_for
from quantine.runtime.load import load_packed
from quantine.source.locate import locate


@own_state()
def breakdown(
    directory: str | Path,
    *,
    context: int = 128,
    runs: int = 5,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure the stages of native decoding, with as many threads as PyTorch uses.

    Args:
        directory: a quantized model, named as for `quantine.source.locate.locate`.
        context: number of tokens that precede those decoded, shortened where the model's is.
        runs: number of measurements.
        on_step: called with a line that says what is measured next.

    Returns:
        * ``model``, ``threads``, ``level`` and ``context``;
        * ``read``, the speed of reading memory in GB/s, and ``token``, microseconds of one;
        * ``stages``: ``name``, ``microseconds`` of a token, ``bytes`` it reads, and their ``share``
          of what memory gives in that time;
        * ``steps``, how many parallel steps a token takes, and ``waiting``, the microseconds in
          which the calling thread waits for others at their ends, part of those of stages;
        * ``outside``, microseconds that no stage has: Python, and choosing the token.

        Microseconds are medians of ``runs``.

    Raises:
        BackendUnavailable: the model does not decode natively; the message says why.
        PlanError: an argument is out of range.
        CheckpointError, FormatError: the model cannot be read.
    """
    if runs < 1 or context < 1:
        raise PlanError(f"runs and context must be positive, not {runs} and {context}")
    source = locate(directory)
    native = backend.native()
    if native is None:
        raise BackendUnavailable("the native extension is turned off or missing: nothing to time")
    (context,) = fitting(source, (context,))
    decoder = decoder_for(load_packed(source, torch.float32), context + DECODED)
    read: list[float] = []
    found: list[_Token] = []
    for run in range(runs):
        on_step(f"stages, {run + 1} of {runs}")
        read.append(memory_speed(CPU))
        found.append(_token(decoder, context))
    speed = statistics.median(read)
    stages = [
        _stage(name, statistics.median(token.stages[name] for token in found), nbytes, speed)
        for name, (_, nbytes) in decoder.stages().items()
    ]
    tokens = [token.microseconds for token in found]
    inside = sum(stage["microseconds"] for stage in stages)
    return {
        "model": source.name,
        "threads": pool().threads,
        "level": native.level(),
        "context": context,
        "read": timed(read),
        "token": timed(tokens),
        "stages": stages,
        "steps": found[-1].steps,
        "waiting": statistics.median(token.waiting for token in found),
        "outside": max(0.0, statistics.median(tokens) - inside),
    }


@dataclass(frozen=True)
class _Token:
    """One measurement: microseconds of a token, those of each stage, and of waiting; steps."""

    microseconds: float
    stages: dict[str, float]
    waiting: float
    steps: int


def _token(decoder: Decoder, context: int) -> _Token:
    """Write some tokens after ``context`` others; what one of them takes."""
    threads = pool()
    decoder.reset()
    decoder.append(prompt_of(context))
    decoder.time_stages(True)
    steps, waited = threads.steps, threads.waited
    taken = seconds(lambda: decode_tokens(decoder))
    return _Token(
        microseconds=_microseconds(taken),
        stages={name: _microseconds(spent) for name, (spent, _) in decoder.stages().items()},
        waiting=_microseconds(threads.waited - waited),
        steps=round((threads.steps - steps) / DECODED),
    )


def _stage(name: str, microseconds: float, nbytes: int, speed: float) -> dict[str, Any]:
    """A row of ``stages``, where memory gives ``speed`` GB/s."""
    share = nbytes / (speed * 1e3 * microseconds) if microseconds else 0.0
    return {"name": name, "microseconds": microseconds, "bytes": nbytes, "share": share}


def _microseconds(taken: float) -> float:
    """Of one token, of ``taken`` seconds for `DECODED`."""
    return taken * 1e6 / DECODED
