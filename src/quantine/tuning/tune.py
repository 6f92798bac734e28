"""`tune`: steps along the gradient of a quantized model's divergence from the float model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from quantine.core.tuning_spec import Tuning
from quantine.errors import CalibrationError
from quantine.tuning.student import Student

HELD_OUT: Final = 8
"""One in so many segments is not tuned on, but judges."""
JUDGED: Final = 4
"""How many times a run is judged after its beginning."""
WARM_UP: Final = 0.1
"""Share of the steps in which the rate rises."""
BETAS: Final = (0.9, 0.98)
"""How slowly Adam forgets gradients and their squares."""
LEAST_SEGMENTS: Final = 2
"""Fewest calibration segments: one to tune on, one to judge by."""


@dataclass(frozen=True)
class Outcome:
    """What tuning gained, on segments that it was not tuned on.

    Attributes:
        steps: number of the step after which the numbers were kept; 0 if none was better.
        before, after: mean divergence from the float model, in nats per token.
    """

    steps: int
    before: float
    after: float

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {"steps": self.steps, "divergence_before": self.before, "divergence": self.after}


def split(segments: Tensor) -> tuple[Tensor, Tensor]:
    """The segments to tune on, and those to judge by: the last of every `HELD_OUT`.

    Args:
        segments: ``[samples, seqlen]`` int64.

    Raises:
        CalibrationError: there are fewer than `LEAST_SEGMENTS`.
    """
    if len(segments) < LEAST_SEGMENTS:
        raise CalibrationError(
            f"tuning needs at least {LEAST_SEGMENTS} samples, one to judge by, not {len(segments)}"
        )
    judges = torch.arange(1, len(segments) + 1) % min(HELD_OUT, len(segments)) == 0
    return segments[~judges], segments[judges]


def tune(
    student: Student, segments: Tensor, tuning: Tuning, seed: int, note: Callable[[str], None]
) -> Outcome:
    """Tune the numbers of ``student``, and leave it with those that were judged best.

    Numbers move by Adam, whose rate rises and then falls along a cosine.

    Args:
        student: the quantized model.
        segments: calibration segments, ``[samples, seqlen]`` int64, on the model's device.
        tuning: how long and how fast.
        seed: of the local generator that orders segments.
        note: receives lines about the progress.
    """
    own, judges = split(segments)
    leaves = [numbers.moved for numbers in student.leaves()]
    adam = torch.optim.Adam(leaves, lr=0.0, betas=BETAS)
    before = best = _judged(student, judges)
    kept, kept_step = [leaf.detach().clone() for leaf in leaves], 0
    order = _endless(len(own), seed)
    for step in range(1, tuning.steps + 1):
        for group in adam.param_groups:
            group["lr"] = tuning.rate * pace(step, tuning.steps)
        seen = 0.0
        for _ in range(tuning.segments):
            seen += student.add_gradients(own[next(order)], 1 / tuning.segments)
        student.pass_gradients()
        adam.step()
        adam.zero_grad()
        student.install()
        note(f"tuning step {step}/{tuning.steps}: divergence {seen / tuning.segments:.4f}")
        if step * JUDGED % tuning.steps < JUDGED:
            judged = _judged(student, judges)
            if judged < best:
                best, kept_step = judged, step
                kept = [leaf.detach().clone() for leaf in leaves]
    with torch.no_grad():
        for leaf, value in zip(leaves, kept, strict=True):
            leaf.copy_(value)
    student.install()
    return Outcome(kept_step, before, best)


def pace(step: int, steps: int) -> float:
    """The share of the rate that step number ``step`` of ``steps`` has."""
    rising = max(1, round(steps * WARM_UP))
    if step < rising:
        return step / rising
    return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / (steps - rising + 1))


def _judged(student: Student, judges: Tensor) -> float:
    return sum(student.divergence(segment) for segment in judges) / len(judges)


def _endless(count: int, seed: int) -> Iterator[int]:
    """Numbers below ``count`` in random orders, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
