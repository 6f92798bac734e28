"""Which pieces of a text begin as the tokenizer begins a text; says it without torch."""

from __future__ import annotations

from typing import Final, Literal, get_args

from quantine.errors import CalibrationError

Bos = Literal["each", "first"]
"""Which pieces of a text begin as the tokenizer begins a text, mostly with a token BOS: ``"each"``,
as every prompt does in use, or only the ``"first"`` of the text, as in the papers' tables."""
BOS_CHOICES: Final[tuple[Bos, ...]] = get_args(Bos)
"""The values of `Bos`."""
BOS_DEFAULT: Final[Bos] = "each"
"""The value of `Bos` where nothing else is asked for."""
SEGMENTS_BEGUN: Final = {"each": ", each begun with BOS", "first": ", not begun with BOS"}
"""What results say of segments, by the value of `quantine.calibrate.token_stream.begun`."""


def check_bos(bos: str) -> None:
    """Refuse a value that is none of `Bos`.

    Raises:
        CalibrationError: it is none.
    """
    if bos not in BOS_CHOICES:
        raise CalibrationError(f"bos must be {' or '.join(BOS_CHOICES)}, not {bos!r}")
