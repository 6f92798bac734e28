"""The text that a model is tuned on, and the text that judges whether it became better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from quantine.calibrate.segments import MOST_SEED, Calibration, draw_segments, held_out_from
from quantine.calibrate.text import read_text
from quantine.calibrate.token_stream import TokenStream, token_stream
from quantine.core.tuning_spec import Tuning
from quantine.errors import CalibrationError

PARTS: Final = ("for blocks", "for the whole model", "that judges")
"""What stretches of the text are for, in order."""
JUDGES: Final = 16
"""Number of segments that judge."""
BLOCK_TOKENS: Final = 2**18
"""Number of tokens, at most, that blocks are tuned on, again and again, unless a segment is longer:
hidden states of all of them are in memory."""


@dataclass(frozen=True)
class TuningText:
    """Segments at random places of three stretches of the calibration text.

    Attributes:
        blocks: ``[n, seqlen]`` int64, that blocks are tuned on; none if they are not tuned.
        whole: ``[steps * segments, seqlen]`` int64, that the whole model is tuned on, in order.
            They do not overlap those of blocks: predictions for text that these have learned would
            say little.
        judges: ``[JUDGES, seqlen]`` int64, to judge by.
    """

    blocks: Tensor
    whole: Tensor
    judges: Tensor

    def as_bytes(self) -> bytes:
        """All token ids, of which a run's identity has a hash."""
        return b"".join(part.numpy().tobytes() for part in self._parts())

    def to(self, device: torch.device) -> TuningText:
        """The same on ``device``."""
        return TuningText(*(part.to(device) for part in self._parts()))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.blocks, self.whole, self.judges


def tuning_text(
    calibration: Calibration,
    tuning: Tuning,
    tokenizer: Any,
    vocabulary: int,
    longest_context: int | None,
) -> TuningText:
    """Draw the segments that ``tuning`` needs from the calibration text.

    Args:
        calibration: the text, and how it is cut; however few samples it asks for.
        tuning: how many segments are tuned on.
        tokenizer: the model's tokenizer of transformers.
        vocabulary: number of tokens that the model knows.
        longest_context: the model's longest context in tokens, ``None`` if it has no limit.

    Raises:
        CalibrationError: as for `quantine.calibrate.segments.calibration_segments`; there is to be
            no calibration; or a stretch of the text is shorter than a segment.
    """
    if not calibration.samples:
        raise CalibrationError(
            "tuning needs calibration text, and there is none: quantize with samples of at least 1"
        )
    length = calibration.segment_length(longest_context)
    source = calibration.source
    text = read_text(source, "calibration", tokenizer)
    whole = token_stream(tokenizer, text, vocabulary, source, calibration.bos)
    cut = held_out_from(whole)
    for_blocks = min(max(1, BLOCK_TOKENS // length), tuning.block_steps * tuning.segments)
    for_whole = tuning.steps * tuning.segments
    cut_blocks = cut * for_blocks // (for_blocks + for_whole)
    stretches = whole.tokens[:cut_blocks], whole.tokens[cut_blocks:cut], whole.tokens[cut:]
    counts = for_blocks, for_whole, JUDGES
    # Other draws than those that codes were solved by, on which the model is much nearer.
    seed = (calibration.seed + 1) % (MOST_SEED + 1)
    drawn = []
    for part, tokens, count in zip(PARTS, stretches, counts, strict=True):
        stretch = TokenStream(whole.begin, tokens)
        if not count:
            drawn.append(torch.empty(0, length, dtype=torch.int64, device="cpu"))
        elif len(tokens) < stretch.text_length(length):
            raise CalibrationError(
                f"the text has {len(whole.tokens)} tokens, too few to tune on: the part of it "
                f"{part} is shorter than a segment of {length}; use a longer text or a smaller "
                "seqlen"
            )
        else:
            drawn.append(draw_segments(stretch, count, length, seed, source))
    return TuningText(*drawn)
