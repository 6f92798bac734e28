"""Plans are compared on a device that refuses tensors of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from other_device import NAME, OtherDevice, no_extension, untouched_extension
from quantine import Calibration, ResumeMismatch
from quantine.comparison.run import Measured, compare
from quantine.comparison.short_forms import plans_of
from quantine.errors import BackendUnavailable

Tiny = Callable[[str], Path]
PLANS = plans_of(["preset:gptq:bits=3:group_size=32"])


def test_rows_are_what_they_are_here(
    tiny: Tiny, text_file: Path, short: Calibration, tmp_path: Path
) -> None:
    measured = Measured((str(text_file),), window=32, limit=2)

    def compared(out: str, device: str) -> list[dict[str, Any]]:
        return compare(tiny("llama"), PLANS, tmp_path / out, short, measured, device=device)

    with OtherDevice(), untouched_extension():
        found = compared("there", NAME)
    with no_extension():
        expected = compared("here", "cpu")
    for there, here in zip(found, expected, strict=True):
        assert there["bits_per_weight"] == here["bits_per_weight"]
        texts = there["texts"]["text.txt"], here["texts"]["text.txt"]
        assert texts[0]["perplexity"] == pytest.approx(texts[1]["perplexity"], rel=2e-2)
    with pytest.raises(ResumeMismatch, match="another device"):
        compared("there", "cpu")
    with pytest.raises(BackendUnavailable, match="no device 'nosuch' here"):
        compared("nowhere", "nosuch")
    assert not (tmp_path / "nowhere").exists()
