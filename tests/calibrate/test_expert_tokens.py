"""Experts that few tokens chose borrow the mean of all."""

from __future__ import annotations

import torch

from quantine.calibrate.expert_tokens import lend_tokens
from quantine.families.layers import Layer
from quantine.kernels.gram import add_gram
from quantine.statistics.hessian import Hessian


def test_the_rarely_chosen_are_filled_up_with_the_mean_and_nobody_else_is_changed() -> None:
    inside = "layers.0.mlp.experts"
    names = [f"{inside}.{n}.gate_proj" for n in range(3)] + [
        f"{inside}.{n}.down_proj" for n in (0, 1)
    ]
    layers = [Layer(name, 6, 4, "block", 0, experts=inside) for name in names]
    layers.append(Layer("layers.0.o_proj", 4, 4, "block", 0))
    tokens = [torch.randn(count, 4) for count in (9, 1, 0, 0, 0, 2)]
    hessians = [Hessian(4, add_gram) for _ in layers]
    for hessian, x in zip(hessians, tokens, strict=True):
        if len(x):
            hessian.update(x)
    before = [hessian.matrix.clone() for hessian in hessians]
    lend_tokens(layers, hessians)
    mean = (before[0] + before[1]) / 10
    assert torch.equal(hessians[0].matrix, before[0])
    torch.testing.assert_close(hessians[1].matrix, before[1] + 3 * mean)
    torch.testing.assert_close(hessians[2].matrix, 4 * mean)
    assert [hessian.tokens for hessian in hessians] == [9, 4, 4, 0, 0, 2]
    assert [hessian.borrowed for hessian in hessians] == [0, 3, 4, 0, 0, 0]
    assert all(
        torch.equal(one.matrix, old) for one, old in zip(hessians[3:], before[3:], strict=True)
    )
