"""Changes of what a block puts out."""

from __future__ import annotations

import pytest
import torch

from quantine.statistics.losses import RelativeLoss, TokenLoss, relative_loss, token_loss


def test_a_loud_token_counts_like_any_other() -> None:
    before = torch.ones(1, 10, 4)
    before[0, 0] *= 1000
    after = before.clone()
    after[0, 1:] *= 1.1  # nine tokens change by a tenth
    assert token_loss([before], [after]).value == pytest.approx(0.9 * 0.01, rel=1e-4)
    assert relative_loss([before], [after]).value < 1e-6
    assert token_loss([before, before], [after, before]).value == pytest.approx(
        0.45 * 0.01, rel=1e-4
    )
    assert token_loss([before.zero_()], [before]).value == 0


@pytest.mark.parametrize("kind", [RelativeLoss, TokenLoss])
def test_losses_of_parts_merge_to_that_of_the_whole(kind: type[RelativeLoss | TokenLoss]) -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(6, 5, 4, generator=generator) for _ in range(2))
    whole, parts = kind(), [kind(), kind()]
    for batch in range(6):
        whole.update(before[batch], after[batch])
        parts[batch // 4].update(before[batch], after[batch])
    parts[0].merge(parts[1])  # type: ignore[arg-type]
    assert parts[0].value == pytest.approx(whole.value, rel=1e-12)
    assert parts[0].value > 0
