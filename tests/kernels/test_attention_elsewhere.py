"""Attention on a device that refuses tensors of the CPU: the same results to the bit.

Every reference, and every choice of a kernel.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from other_device import check_same
from quantine.kernels.kv_attention import attend
from quantine.kernels.kv_attention.packed_states import PackedStates
from quantine.kernels.kv_attention.packing import (
    pack_states,
    pack_states_reference,
    round_states,
)
from quantine.kernels.kv_attention.reference import attend_reference
from quantine.kernels.kv_attention.scoring import Scoring
from quantine.kernels.kv_attention.tiled import attend_in_tiles
from samples import generator

HEADS, KV_HEADS, TOKENS, DIM = 4, 2, 20, 16


def states(heads: int, tokens: int, seed: int) -> Tensor:
    return torch.randn(2, heads, tokens, DIM, generator=generator(seed))


def channels() -> tuple[Tensor, Tensor]:
    """Scale and zero point of 4 bit, ``[heads, dim]``."""
    scale = torch.rand(KV_HEADS, DIM, generator=generator(11)) * 0.3 + 0.1
    return scale, torch.randint(4, 12, (KV_HEADS, DIM), generator=generator(12)).float()


def feedback() -> Tensor:
    return (torch.randn(KV_HEADS, DIM, DIM, generator=generator(13)) * 0.1).triu(1).half()


def packed_of(x: Tensor, scale: Tensor, zero: Tensor, fed: Tensor | None) -> PackedStates:
    packed = pack_states_reference(x, 4, scale, zero, fed)
    return PackedStates(packed, 4, scale, zero, torch.float32)


@pytest.mark.parametrize("fed", [False, True])
def test_states_are_packed_rounded_and_decoded(fed: bool) -> None:
    def packed(x: Tensor, scale: Tensor, zero: Tensor, fed: Tensor | None) -> list[Tensor]:
        reference = pack_states_reference(x, 4, scale, zero, fed)
        chosen = torch.empty_like(reference)
        pack_states(x, 4, scale, zero, chosen, fed)
        rounded = [] if fed is None else [round_states(x, 4, scale, zero, fed)]
        decoded = PackedStates(reference, 4, scale, zero, torch.float32).decoded()
        return [reference, chosen, decoded, *rounded]

    check_same(packed, states(KV_HEADS, TOKENS, 1), *channels(), feedback() if fed else None)


@pytest.mark.parametrize("context", [20, 70])
@pytest.mark.parametrize("in_codes", [False, True])
@pytest.mark.parametrize(
    "scoring",
    [
        Scoring(0.25),
        Scoring(0.25, softcap=5.0),
        Scoring(0.25, softmax_bits=8),
        Scoring(0.25, softmax_bits=8, relative=False),
    ],
)
def test_attention(scoring: Scoring, in_codes: bool, context: int) -> None:
    def attended(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: Tensor, zero: Tensor
    ) -> list[Tensor | None]:
        with torch.no_grad():
            if in_codes:
                key, value = (packed_of(x, scale, zero, None) for x in (key, value))
            args = query, key, value, mask, scoring
            chosen = attend_reference(*args) if query.device.type == "cpu" else attend(*args)
            return [*attend_reference(*args), *attend_in_tiles(*args, keep=True), *chosen]

    hidden = torch.zeros(TOKENS, context).masked_fill_(
        torch.ones(TOKENS, context).triu(1 + context - TOKENS).bool(), torch.finfo().min
    )
    query = states(HEADS, TOKENS, 2)
    key, value = states(KV_HEADS, context, 3), states(KV_HEADS, context, 4)
    check_same(attended, query, key, value, hidden.expand(2, 1, -1, -1), *channels())


def test_attention_has_gradients() -> None:
    def gradient(query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        query.requires_grad_()
        attend(query, key, value, None, Scoring(0.25))[0].square().sum().backward()
        return query.grad

    check_same(gradient, states(HEADS, 4, 2), states(KV_HEADS, 4, 3), states(KV_HEADS, 4, 4))
