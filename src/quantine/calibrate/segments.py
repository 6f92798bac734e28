"""Cutting a text into calibration segments of token ids."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor

from quantine.calibrate.bos import BOS_DEFAULT, Bos, check_bos
from quantine.calibrate.text import BUILTIN, read_text
from quantine.calibrate.token_stream import TokenStream, token_stream
from quantine.errors import CalibrationError, ending, shown

DEFAULT_SAMPLES: Final = 64
"""Number of calibration segments where nothing else is asked for."""
DEFAULT_SEQLEN: Final = 512
"""Tokens per calibration segment where nothing else is asked for."""
MOST_SEED: Final = 2**63 - 1
"""Largest seed that PyTorch's generators take."""
MOST_TOKENS: Final = 2**28
"""Largest number of calibration tokens accepted, a hundred times what any method has been shown to
profit from."""
HELD_OUT: Final = 8
"""A calibration text is cut into so many parts, the last of which is not tuned on: tuning is judged
by it."""


@dataclass(frozen=True)
class Calibration:
    """A request for calibration: which text, how much of it, and in which precision.

    Raises `CalibrationError` if ``samples`` is negative, ``seqlen`` below 1, ``shards`` below 1 or
    above ``samples``, ``seed`` negative or above `MOST_SEED`, ``bos`` unknown, or one of them of
    another type.

    Attributes:
        source: a text, named as for `quantine.calibrate.text.read_text`.
        samples: number of segments; 0 runs no calibration, which only methods that need no inputs
            accept.
        seqlen: tokens per segment; ``None`` is 512, or the model's longest context if shorter.
        seed: seed of the local generator that places the segments in the text.
        bfloat16: multiply matrices in bfloat16 while calibrating: several times faster where the
            processor can. Weights, norms, hidden states and statistics stay in float32.
        bos: which segments begin as the tokenizer begins a text, see
            `quantine.calibrate.bos.Bos`.
        shards: number of parts of the text whose statistics are summed one after another, see
            `quantine.calibrate.shards`; as many processes can share a run, or fewer.
    """

    source: str = BUILTIN
    samples: int = DEFAULT_SAMPLES
    seqlen: int | None = None
    seed: int = 0
    bfloat16: bool = False
    bos: Bos = BOS_DEFAULT
    shards: int = 1

    def __post_init__(self) -> None:
        for name in ("samples", "seqlen", "seed", "shards"):
            value = getattr(self, name)
            if type(value) is not int and not (name == "seqlen" and value is None):
                raise CalibrationError(f"{name} must be a whole number, not {shown(value)}")
        if not isinstance(self.bfloat16, bool):
            raise CalibrationError(f"bfloat16 must be true or false, not {shown(self.bfloat16)}")
        if not 0 <= self.seed <= MOST_SEED:
            raise CalibrationError(f"seed must be from 0 to {MOST_SEED}, not {shown(self.seed)}")
        if self.samples < 0:
            raise CalibrationError(f"samples must not be negative, not {self.samples}")
        if self.seqlen is not None and self.seqlen < 1:
            raise CalibrationError(f"seqlen must be positive, not {self.seqlen}")
        if not 1 <= self.shards <= max(1, self.samples):
            raise CalibrationError(
                f"shards must be from 1 to the number of samples, {self.samples}, not {self.shards}"
            )
        check_bos(self.bos)

    def segment_length(self, longest_context: int | None) -> int:
        """Tokens per segment for a model with a context of at most ``longest_context`` tokens.

        Args:
            longest_context: ``None`` for a model without a limit.

        Raises:
            CalibrationError: ``seqlen`` is longer than the model's context.
        """
        longest = longest_context or DEFAULT_SEQLEN
        if self.seqlen is None:
            return min(DEFAULT_SEQLEN, longest)
        if longest_context is not None and self.seqlen > longest_context:
            raise CalibrationError(
                f"seqlen {self.seqlen} exceeds the model's context of {longest_context} tokens"
            )
        return self.seqlen


def draw_segments(stream: TokenStream, samples: int, length: int, seed: int, source: str) -> Tensor:
    """Draw calibration segments at random places of a text.

    Places are drawn with replacement by ``random.Random(seed)``. Segments are never padded.

    Args:
        stream: the tokens of the text, and those that every segment begins with.
        samples: number of segments.
        length: tokens of a segment.
        seed: seed of the local generator.
        source: name of the text, for messages.

    Returns:
        ``[samples, length]`` int64.

    Raises:
        CalibrationError: the text is shorter than one segment, or a segment has no room for text.
    """
    available, needed = len(stream.tokens), stream.text_length(length)
    if needed < 1:
        raise CalibrationError(
            f"a segment of {length} tokens has no room for text, as the tokenizer begins it with "
            f"{len(stream.begin)}: use a larger seqlen"
        )
    if available < needed:
        raise CalibrationError(
            f"the text {ending(source)!r} has {available} tokens, too few for one segment of "
            f"{length}: use a longer text or a smaller seqlen"
        )
    generator = random.Random(seed)
    # The last window is never drawn, as in GPTQ's published calibration, unless it is the only one.
    last = max(0, available - needed - 1)
    return stream.pieces([generator.randint(0, last) for _ in range(samples)], length)


def held_out_from(stream: TokenStream) -> int:
    """The number of the first token of the part of a text that only judges, see `HELD_OUT`."""
    return len(stream.tokens) - len(stream.tokens) // HELD_OUT


def calibration_segments(
    calibration: Calibration,
    tokenizer: Any,
    vocabulary: int,
    longest_context: int | None,
    *,
    holds_out: bool = False,
) -> Tensor:
    """Read, tokenize and cut the text that ``calibration`` asks for.

    Args:
        calibration: the request.
        tokenizer: the model's tokenizer of transformers.
        vocabulary: number of tokens that the model knows.
        longest_context: the model's longest context in tokens, ``None`` if it has no limit.
        holds_out: draw nothing from the last part of the text, see `HELD_OUT`.

    Returns:
        ``[samples, seqlen]`` int64 token ids.

    Raises:
        CalibrationError: the text cannot be read or is too short, the tokenizer belongs to another
            model, segments are longer than the context, or there are more than `MOST_TOKENS`
            tokens.
    """
    length = calibration.segment_length(longest_context)
    if calibration.samples * length > MOST_TOKENS:
        raise CalibrationError(
            f"{calibration.samples} samples of {length} tokens are more than {MOST_TOKENS:,} "
            "tokens: use fewer"
        )
    source = calibration.source
    text = read_text(source, "calibration", tokenizer)
    stream = token_stream(tokenizer, text, vocabulary, source, calibration.bos)
    available, needed = len(stream.tokens), stream.text_length(length)
    left = held_out_from(stream)
    if holds_out and left < needed <= available:  # else a text that is too short is told below
        raise CalibrationError(
            f"the text {ending(source)!r} has {available} tokens, too few for one segment of "
            f"{length} without the last {available - left}, which compensate leaves to judge "
            "tuning by: use a longer text or a smaller seqlen, or leave out compensate"
        )
    if holds_out and needed <= available:
        stream = replace(stream, tokens=stream.tokens[:left])
    return draw_segments(stream, calibration.samples, length, calibration.seed, source)
