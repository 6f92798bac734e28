"""`tune`: steps along the gradient of a quantized model's divergence from the float model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from quantine.core.tuning_spec import Tuning
from quantine.tuning.segments import TuningText
from quantine.tuning.student import Student

JUDGED: Final = 2
"""How many times a run is judged after its beginning."""
WARM_UP: Final = 0.1
"""Share of the steps in which the rate rises."""
BETAS: Final = (0.9, 0.98)
"""How slowly Adam forgets gradients and their squares."""
TOKENS_AT_ONCE: Final = 2048
"""Number of tokens whose gradients are computed at once, unless a segment is longer: each block
keeps what it computed of them."""


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


def tune(
    student: Student, text: TuningText, tuning: Tuning, note: Callable[[str], None]
) -> Outcome:
    """Tune the numbers of ``student``, and leave it with those that were judged best.

    Numbers move by Adam, whose rate rises and then falls along a cosine.

    Args:
        student: the quantized model.
        text: what to tune on and to judge by, on the model's device.
        tuning: how long and how fast.
        note: receives lines about the progress.
    """
    leaves = [numbers.moved for numbers in student.leaves()]
    adam = torch.optim.Adam(leaves, lr=0.0, betas=BETAS)
    before = best = student.divergence(text.judges)
    kept, kept_step = [leaf.detach().clone() for leaf in leaves], 0
    at_once = max(1, TOKENS_AT_ONCE // text.own.shape[1])
    for step, segments in enumerate(text.own.split(tuning.segments), start=1):
        for group in adam.param_groups:
            group["lr"] = tuning.rate * pace(step, tuning.steps)
        seen = 0.0
        for batch in segments.split(at_once):
            share = len(batch) / tuning.segments
            seen += share * student.add_gradients(batch, share)
        student.pass_gradients()
        adam.step()
        adam.zero_grad()
        student.install()
        note(f"tuning step {step}/{tuning.steps}: divergence {seen:.4f}")
        if step * JUDGED % tuning.steps < JUDGED:
            judged = student.divergence(text.judges)
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
