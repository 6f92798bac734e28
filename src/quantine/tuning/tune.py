"""`tune`: a quantized model follows the float model, block by block and then as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from quantine.core.tuning_spec import Tuning
from quantine.families.family import Family
from quantine.tuning.blocks import tune_blocks
from quantine.tuning.kept_blocks import KeptBlocks
from quantine.tuning.part import Descent
from quantine.tuning.segments import TuningText
from quantine.tuning.student import Student

JUDGED: Final = 2
"""How many times a run is judged after its beginning."""
TOKENS_AT_ONCE: Final = 2048
"""Number of tokens whose gradients are computed at once, unless a segment is longer: each block
keeps what it computed of them."""


def segments_at_once(length: int, rounds: bool) -> int:
    """Number of segments whose gradients of the whole model are computed at once.

    Args:
        length: tokens of a segment.
        rounds: whether activations are rounded, so that each block keeps all scores of attention.
    """
    return 1 if rounds else max(1, TOKENS_AT_ONCE // length)


@dataclass(frozen=True)
class Outcome:
    """What tuning gained, on segments that it was not tuned on.

    Attributes:
        steps: number of the step after which the numbers were kept; 0 if none was better.
        before, after: mean divergence from the float model, in nats per token.
        blocks: the same after blocks were tuned one by one; ``None`` if they were not, or if it was
            no finite number.
        moved: share of the codes that changed.
    """

    steps: int
    before: float
    after: float
    blocks: float | None
    moved: float

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {
            "steps": self.steps,
            "divergence_before": self.before,
            **({} if self.blocks is None else {"divergence_after_blocks": self.blocks}),
            "divergence": self.after,
            "codes_moved": self.moved,
        }


def tune(
    student: Student,
    family: Family,
    text: TuningText,
    tuning: Tuning,
    at_once: int,
    kept_blocks: KeptBlocks,
    note: Callable[[str], None],
) -> Outcome:
    """Tune the numbers of ``student``, and leave it with those that were judged best.

    Blocks are tuned first, one by one and with their codes; then the whole model, whose codes stay.

    Args:
        student: the quantized model.
        family: its architecture.
        text: what to tune on and to judge by, on the model's device.
        tuning: how long and how fast.
        at_once: number of segments whose gradients of the whole model are computed at once.
        kept_blocks: see `tune_blocks`.
        note: receives lines about the progress.
    """
    whole = student.whole
    before = best = student.divergence(text.judges)
    start = kept = whole.snapshot()
    kept_step, blocks = 0, None
    if tuning.block_steps:
        tune_blocks(student, family, text, tuning, kept_blocks, note)
        blocks = student.divergence(text.judges)
        note(f"tuned blocks: divergence {before:.4f} before, {blocks:.4f} after")
        blocks = blocks if math.isfinite(blocks) else None
        if blocks is not None and blocks < best:
            best, kept = blocks, whole.snapshot()
        else:
            whole.restore(start)
    descent = Descent(whole, tuning.rate, tuning.steps)
    for step, segments in enumerate(text.whole.split(tuning.segments), start=1):
        seen = 0.0
        for batch in segments.split(at_once):
            share = len(batch) / tuning.segments
            seen += share * student.add_gradients(batch, share)
        descent.step()
        note(f"tuning step {step}/{tuning.steps}: divergence {seen:.4f}")
        if step * JUDGED % tuning.steps < JUDGED:
            judged = student.divergence(text.judges)
            if judged < best:
                best, kept_step, kept = judged, step, whole.snapshot()
    whole.restore(kept)
    return Outcome(kept_step, before, best, blocks, _moved(start.codes, kept.codes))


def _moved(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The share of codes that changed."""
    changed = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    return changed / sum(codes.numel() for codes in before)
