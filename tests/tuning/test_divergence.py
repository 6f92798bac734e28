"""The divergence of predictions and its gradient, against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from quantine.tuning import divergence as module
from quantine.tuning.divergence import divergence


@pytest.mark.parametrize("positions", [1, 7, 8, 23])
def test_divergence_and_gradient_are_pytorchs(
    positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", 8 * 50)
    drawn = torch.Generator().manual_seed(positions)
    reference = torch.randn(positions, 50, generator=drawn) * 3
    logits = (reference + torch.randn(positions, 50, generator=drawn)).requires_grad_()
    expected = kl_div(
        logits.log_softmax(-1), reference.log_softmax(-1), reduction="sum", log_target=True
    )
    expected.backward()
    gradient = torch.empty_like(logits)
    found = divergence(reference, logits.detach(), gradient, 0.5)
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert logits.grad is not None
    torch.testing.assert_close(gradient, logits.grad * 0.5, rtol=1e-4, atol=1e-6)


def test_equal_predictions_do_not_diverge() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])
    gradient = torch.empty_like(logits)
    found = divergence(logits, logits + 5, gradient)
    assert found == pytest.approx(0, abs=1e-6)
    assert torch.equal(gradient, torch.zeros_like(logits))
