"""quantine's attention, as transformers calls it."""

from __future__ import annotations

import torch
from torch import nn

from quantine.activations.attention import attention


def test_a_mask_of_booleans_hides_tokens() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8) for _ in range(3))
    seen = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    added = torch.zeros(1, 1, 5, 5).masked_fill(~seen, -1e30)
    found, probabilities = attention(nn.Module(), query, key, value, seen)
    expected, _ = attention(nn.Module(), query, key, value, added)
    assert torch.allclose(found, expected)
    assert not probabilities.masked_select(~seen).any()
