"""The text that is tuned on, and the part of it that judges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantine.calibrate.segments import HELD_OUT, MOST_SEED, Calibration, calibration_segments
from quantine.core.tuning_spec import Tuning
from quantine.errors import CalibrationError
from quantine.tuning.blocks import HELD_OUT as BLOCK_JUDGES
from quantine.tuning.blocks import block_segments
from quantine.tuning.segments import JUDGES, tuning_text


class Words:
    """A tokenizer: every word is a number, and its own token."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split() if word.isdigit()]}


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(map(str, range(800))))
    return Calibration(str(path), samples=1, seqlen=20)


def test_what_judges_is_not_tuned_on(calibration: Calibration) -> None:
    tuning = Tuning(steps=6, segments=5, block_steps=2)
    text = tuning_text(calibration, tuning, Words(), 800, None)
    assert (len(text.blocks), len(text.whole)) == (10, 30)
    assert text.judges.shape == (JUDGES, 20)
    last = 800 - 800 // HELD_OUT
    assert max(text.blocks.max(), text.whole.max()) < last <= text.judges.min()
    again = tuning_text(calibration, tuning, Words(), 800, None)
    assert again.as_bytes() == text.as_bytes()
    other = replace(calibration, seed=1)
    assert tuning_text(other, Tuning(), Words(), 800, None).as_bytes() != text.as_bytes()


def test_blocks_and_the_whole_have_segments_of_their_own(calibration: Calibration) -> None:
    tuning = Tuning(steps=2, segments=5, block_steps=4)
    text = tuning_text(calibration, tuning, Words(), 800, None)
    held, blocks = block_segments(text).split([BLOCK_JUDGES, 20])
    assert held.equal(text.judges[:BLOCK_JUDGES])
    assert blocks.equal(text.blocks)
    assert (len(text.blocks), len(text.whole)) == (20, 10)
    assert not set(text.blocks.flatten().tolist()) & set(text.whole.flatten().tolist())
    text = tuning_text(calibration, replace(tuning, block_steps=0), Words(), 800, None)
    assert not block_segments(text).numel()


def test_the_whole_is_not_tuned_on_what_it_was_solved_by(calibration: Calibration) -> None:
    tuning = Tuning(steps=2, segments=5, block_steps=0)
    solved = calibration_segments(
        replace(calibration, samples=10), Words(), 800, None, holds_out=True
    )
    tuned = tuning_text(calibration, tuning, Words(), 800, None).whole
    assert tuned.shape == solved.shape
    assert not set(solved[:, 0].tolist()) & set(tuned[:, 0].tolist())
    last = replace(calibration, seed=MOST_SEED)
    first = replace(calibration, seed=0, samples=10)
    tuned = tuning_text(last, tuning, Words(), 800, None).whole
    assert tuned.equal(calibration_segments(first, Words(), 800, None, holds_out=True))


def test_too_little_text_is_refused(calibration: Calibration) -> None:
    with pytest.raises(CalibrationError, match="samples"):
        tuning_text(replace(calibration, samples=0), Tuning(), Words(), 800, None)
    for seqlen, part in ((101, "that judges"), (160, "for the whole model")):
        with pytest.raises(CalibrationError, match=f"too few to tune on: the part of it {part}"):
            tuning_text(replace(calibration, seqlen=seqlen), Tuning(), Words(), 800, None)
