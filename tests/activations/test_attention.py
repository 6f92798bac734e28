"""quantine's attention, as transformers calls it."""

from __future__ import annotations

import torch
from torch import nn

from quantine.activations.attention import attention
from quantine.activations.modules import AttentionSites


def test_a_mask_of_booleans_hides_tokens() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8) for _ in range(3))
    seen = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    added = torch.zeros(1, 1, 5, 5).masked_fill(~seen, -1e30)
    found, probabilities = attention(nn.Module(), query, key, value, seen)
    expected, _ = attention(nn.Module(), query, key, value, added)
    assert torch.allclose(found, expected)
    assert not probabilities.masked_select(~seen).any()


def test_what_is_put_onto_an_unrounded_site_counts() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 4, 8) for _ in range(3))
    module = nn.Module()
    module.sites = AttentionSites()
    before, _ = attention(module, query, key, value, None)
    hook = module.sites.value.register_forward_hook(lambda site, args, output: output * 2)
    assert torch.allclose(attention(module, query, key, value, None)[0], before * 2)
    hook.remove()
    module.sites.value.forward = lambda x: x * 3
    assert torch.allclose(attention(module, query, key, value, None)[0], before * 3)


def test_gradients_pass_rounded_probabilities_as_if_they_were_not() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 4, 8) for _ in range(3))
    gradients = []
    for bits in (16, 3):
        module, asked = nn.Module(), query.clone().requires_grad_()
        module.sites = AttentionSites()
        module.sites.softmax = bits
        found, _ = attention(module, asked, key, value, None)
        found.sum().backward()
        gradients.append(asked.grad)
    assert gradients[0].any()
    assert torch.equal(*gradients)
