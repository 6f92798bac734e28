"""Sums of squared gradients, in one piece and in parts."""

from __future__ import annotations

import torch

from quantine.statistics.gradients import SquaredGradients


def test_parts_merge_to_the_whole() -> None:
    gradients = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(1))
    whole, first, second = (SquaredGradients() for _ in range(3))
    whole.update(gradients)
    first.update(gradients[:4])
    second.update(gradients[4:])
    first.merge(second)
    first.merge(SquaredGradients())  # of a process without a segment
    assert first.tokens == whole.tokens == 21
    torch.testing.assert_close(first.mean(), gradients.square().mean((0, 1)))
    torch.testing.assert_close(first.mean(), whole.mean())
