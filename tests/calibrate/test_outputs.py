"""Changes of what a block puts out."""

from __future__ import annotations

import pytest
import torch

from quantine.calibrate.submodules import relative_change, token_change


def test_a_loud_token_counts_like_any_other() -> None:
    before = torch.ones(1, 10, 4)
    before[0, 0] *= 1000
    after = before.clone()
    after[0, 1:] *= 1.1  # nine tokens change by a tenth
    assert token_change([before], [after]) == pytest.approx(0.9 * 0.01, rel=1e-4)
    assert relative_change([before], [after]) < 1e-6
    assert token_change([before, before], [after, before]) == pytest.approx(0.45 * 0.01, rel=1e-4)
    assert token_change([before.zero_()], [before]) == 0
