"""What looks like a reorder and is none is not proved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantine.activations.proof import Proof, random_order
from quantine.families.derivation.one_by_one import BlockCall
from quantine.families.family import Link
from quantine.families.heads import Heads

HIDDEN = Link("R5", "weights", ("up",), ("down",))
NORM = Link("R4", "gather", ("norm",), ("up",))


class Block(nn.Module):
    """An MLP behind a norm, which may be odd in one way."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        self.way = way
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.slopes = nn.PReLU(16)
        self.slopes.weight = nn.Parameter(torch.rand(16))
        self.dead = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        y = self.norm(x)
        inner = self.up(y)
        inner = self.slopes(inner) if self.way == "slopes" else inner.relu()
        if self.way == "neighbours":
            inner = inner + inner.roll(1, -1)
        out = self.down(inner)
        return x + out + (y if self.way == "read" else 0), "done"


ONE = Heads(1, 1)


def proof_of(way: str = "", heads: Heads = ONE) -> Proof:
    torch.manual_seed(0)
    block: Any = Block(way).requires_grad_(False)
    return Proof(BlockCall(block, torch.randn(2, 5, 8), ((), {})), heads, 8)


def test_a_reorder_is_proved_and_the_block_stays_as_it_is() -> None:
    proof = proof_of()
    before = proof.call.output()
    assert proof.holds(HIDDEN)
    assert proof.holds(NORM)
    assert torch.equal(proof.call.output(), before)


@pytest.mark.parametrize(
    ("way", "link"),
    [
        ("slopes", HIDDEN),  # each channel has a slope of its own
        ("neighbours", HIDDEN),  # channels read those beside them
        ("read", NORM),  # the norm's output is added elsewhere
        ("", Link("R5", "weights", ("dead",), ("down",))),  # which has no part in it
        ("", Link("R4", "gather", ("norm",), ("down",))),  # which reads something else
        ("", Link("R5", "weights", ("up",), ("down",), rows="last", per_head=True)),
    ],
)
def test_what_changes_the_block_is_not_proved(way: str, link: Link) -> None:
    heads = Heads(2, 1) if link.per_head else ONE
    assert not proof_of(way, heads).holds(link)


def test_an_order_keeps_channels_in_their_heads() -> None:
    order = random_order(12, 3)
    assert sorted(order.tolist()) == list(range(12))
    assert (order // 4).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert order.tolist() != list(range(12))


def test_a_block_without_attention_has_no_place_that_rounds() -> None:
    assert proof_of().attention() == ""
