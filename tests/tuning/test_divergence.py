"""The divergence of predictions and its gradient, against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from quantine.tuning.divergence import ROWS_AT_ONCE, divergence


@pytest.mark.parametrize("positions", [1, 7, ROWS_AT_ONCE + 3])
def test_divergence_and_gradient_are_pytorchs(positions: int) -> None:
    drawn = torch.Generator().manual_seed(positions)
    reference = torch.randn(positions, 50, generator=drawn) * 3
    logits = (reference + torch.randn(positions, 50, generator=drawn)).requires_grad_()
    expected = kl_div(
        logits.log_softmax(-1), reference.log_softmax(-1), reduction="sum", log_target=True
    )
    expected.backward()
    found, gradient = divergence(reference, logits.detach())
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert logits.grad is not None
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-4, atol=1e-6)


def test_equal_predictions_do_not_diverge() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])
    found, gradient = divergence(logits, logits + 5)
    assert found == pytest.approx(0, abs=1e-6)
    assert torch.equal(gradient, torch.zeros_like(logits))
