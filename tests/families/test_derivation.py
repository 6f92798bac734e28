"""Families are found by running small models, and what is not understood is refused by name."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from quantine.errors import FamilyError
from quantine.families import described_family, family_of
from quantine.families.derivation.derive import derive
from quantine.families.derivation.matrices import groups_of, kept_in
from quantine.families.derivation.small import FEW_PARAMETERS, small_config, small_model
from quantine.families.derivation.trace import Trace, traced
from quantine.families.stand_in import StandIn
from tiny_models import FAMILIES, tiny_config


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_described_is_found(name: str) -> None:
    config = tiny_config(name)
    described, found = described_family(config.model_type), derive(config)
    for index in range(config.num_hidden_layers):
        assert found.groups_in(index) == described.groups_in(index)
    for field in ("blocks", "embedding", "head", "outputs", "kept", "fixed"):
        assert getattr(found, field) == getattr(described, field), field


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "gpt2"])
def test_a_large_model_is_found_by_a_small_one(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    before = config.to_dict()
    assert derive(config).groups == described_family(kind).groups
    assert config.to_dict() == before
    assert sum(p.numel() for p in small_model(config).parameters()) < FEW_PARAMETERS


def test_the_callers_random_numbers_stay_the_same() -> None:
    states = []
    for studied in (False, True):
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        if studied:
            derive(tiny_config("llama"))
        states.append((torch.rand(3).tolist(), random.random(), np.random.rand()))
    assert states[0] == states[1]


def test_a_described_family_is_taken_as_it_is() -> None:
    assert family_of(tiny_config("opt")) is described_family("opt")


def test_blocks_may_differ() -> None:
    types = ["conv", "full_attention"] * 2
    config = AutoConfig.for_model("lfm2", num_hidden_layers=4, layer_types=types)
    family = derive(small_config(config))
    conv, attention = family.groups_in(0), family.groups_in(1)
    assert conv[:2] == (("conv.in_proj",), ("conv.out_proj",))
    assert attention[0] == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert family.groups_in(2) == conv
    assert dict(family.kept) == {"conv.conv.weight": "no matrix of a product"}


def test_matrices_that_text_does_not_need_are_kept() -> None:
    family = derive(small_config(AutoConfig.for_model("bart"), 2))
    assert family.groups[0] == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert dict(family.kept)["encoder_attn.k_proj.weight"] == "not used for text alone"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("jetmoe", r"mlp\.input_linear\.weight \(4, 256, 64\) .* is used by linear"),
        ("gemma4_text", "reads more of a text than the outputs of the block before"),
        ("xlm", "do not stand in one ModuleList but in transformer.attentions, transformer.ffns"),
        ("xlnet", r"layer\.0\.rel_attn\.q \(64, 4, 16\) .* is used by einsum"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(kind: str, reason: str) -> None:
    with pytest.raises(FamilyError, match=f"^{kind} models are not understood: .*(?:{reason})"):
        derive(small_config(AutoConfig.for_model(kind), 2))


def test_relations_between_sizes_are_kept() -> None:
    small = small_config(AutoConfig.for_model("mamba2"))
    assert small.num_heads * small.head_dim == small.expand * small.hidden_size
    small = small_config(AutoConfig.for_model("llama", num_attention_heads=64))
    assert (small.num_attention_heads, small.num_key_value_heads) == (4, 4)
    small = small_config(AutoConfig.for_model("llama", num_key_value_heads=8))
    assert (small.num_attention_heads, small.num_key_value_heads) == (4, 2)


def test_fewer_blocks_are_some_of_each_kind() -> None:
    types = ["sliding_attention"] * 5 + ["full_attention"]
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=6, layer_types=types)
    small = small_config(config, 2)
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert small.num_hidden_layers == 2
    assert small_config(config).layer_types == types


class Block(nn.Module):
    """Matrices on one input, on a view and on a changed copy of it, and a table of factors."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Linear(8, 8) for _ in range(4))
        self.factors = nn.Parameter(torch.ones(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x) + self.two(x.view(-1, 8)).view_as(x) * self.factors[0]
        x.mul_(2)
        return self.four(self.three(x) + y)


def trace_of(block: nn.Module) -> Trace:
    model = nn.Module()
    model.block = block
    with torch.no_grad(), traced(model) as trace:
        block(torch.randn(2, 5, 8))
    return trace


def test_views_share_an_input_and_what_was_written_to_is_another() -> None:
    trace = trace_of(Block())
    assert groups_of("block", {}, trace) == (("one", "two"), ("three",), ("four",))


def test_a_parameter_that_is_no_matrix_is_kept() -> None:
    block = Block()
    assert kept_in(block, "block", trace_of(block), {}) == {"factors": "no matrix of a product"}


class Odd(Block):
    """A block that is odd in one way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.experts[1](self.experts[0](x)) if self.way != "expert" else self.experts[0](x)
        if self.way == "product":
            x = x @ self.factors.T
        elif self.way == "weight":
            x = x * self.one.weight[0]
        elif self.way == "twice":
            x = self.one(self.one(x))
        return x


def test_experts_that_were_not_chosen_are_refused() -> None:
    block = Odd("expert")
    with pytest.raises(FamilyError, match=r"block\.experts\.1 did not run: experts in lists"):
        kept_in(block, "block", trace_of(block), {})


def test_products_outside_of_modules_are_refused() -> None:
    block, shapes = Odd("product"), {"block.factors": (33, 800)}
    with pytest.raises(FamilyError, match=r"block\.factors \(3, 8\) in a Odd is used by matmul"):
        kept_in(block, "block", trace_of(block), shapes)


def test_narrow_ones_of_the_model_itself_are_kept() -> None:
    block, shapes = Odd("product"), {"block.factors": (32, 800)}
    kept = kept_in(block, "block", trace_of(block), shapes)
    assert kept["factors"] == "in no Linear module, and only 32 wide or less"


def test_few_of_the_model_itself_are_kept_and_the_reason_says_how_few() -> None:
    block = Odd("product")
    shapes = {f"block.{name}": (100, 100) for name, one in block.named_parameters() if one.ndim > 1}
    kept = kept_in(block, "block", trace_of(block), {**shapes, "block.factors": (50, 100)})
    share = 50 / (100 * (len(shapes) - 1) + 50)
    assert kept["factors"] == f"in no Linear module; with its like {share:.1%} of its block"
    assert share < 0.1
    with pytest.raises(FamilyError, match=r"more than 10% of a block, and here they are 25%"):
        kept_in(block, "block", trace_of(block), {**shapes, "block.factors": (200, 100)})


def test_a_matrix_that_is_read_elsewhere_is_kept() -> None:
    block = Odd("weight")
    reason = kept_in(block, "block", trace_of(block), {})["one.weight"]
    assert reason == "read outside of its module, too (__getitem__, mul)"


def test_a_matrix_that_runs_twice_is_kept() -> None:
    block = Odd("twice")
    kept = kept_in(block, "block", trace := trace_of(block), {})
    assert kept["one.weight"] == "it runs 2 times in one pass"
    assert groups_of("block", kept, trace) == (("experts.0",), ("experts.1",))


class Doubling(nn.Linear):
    """A Linear module that does something else, too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Same(nn.Linear):
    """A Linear module with a way of its own to do what its class does."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def test_what_a_module_computes_counts_and_not_its_class() -> None:
    block = Block()
    block.one, block.two = Doubling(8, 8), Same(8, 8)
    kept = kept_in(block, "block", trace_of(block), {})
    assert kept == {
        "one.weight": "its Doubling does not only multiply",
        "factors": "no matrix of a product",
    }


@pytest.mark.parametrize("outputs", [0, 1, 3])
def test_a_stand_in_takes_hidden_states_by_place_or_by_name(outputs: int) -> None:
    class Called(nn.Module):
        kind = "some"

        def forward(self, states: Tensor, mask: Any = None) -> Tensor:
            return states

    stand_in, states = StandIn(Called(), outputs), torch.ones(1, 2, 3)
    for result in (stand_in(states, mask=5), stand_in(mask=5, states=states)):
        hidden = result[0] if outputs else result
        assert hidden is states
        assert not outputs or result[1:] == (None,) * (outputs - 1)
        assert (stand_in.args, stand_in.kwargs, stand_in.kind) == ((), {"mask": 5}, "some")
        assert stand_in.entered() is states
