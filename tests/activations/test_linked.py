"""Reorders are found by running small models, proved there, and otherwise left alone by name."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from quantine.activations.linked import (
    EXPERTS,
    MORE_READERS,
    NO_NORM,
    UNPROVED,
    derive_links,
    linked_family,
)
from quantine.families import described_family
from quantine.families.derivation.small import small_config
from quantine.families.family import Family, Link
from quantine.families.heads import Heads
from quantine.survey.specimen import specimen_config
from tiny_models import FAMILIES, tiny_config

DESCRIBED = [
    name
    for name in FAMILIES
    if described_family(tiny_config(name).model_type).links and name != "opt_projected"
]


def found_in(kind: str, blocks: int = 2, **changes: Any) -> Family:
    return derive_links(small_config(AutoConfig.for_model(kind, **changes), blocks))


def kinds_in(family: Family) -> list[str]:
    return [" ".join(link.kind for link in links) for links in family.block_links]


@pytest.mark.parametrize("name", DESCRIBED)
def test_what_is_described_is_found(name: str) -> None:
    config = tiny_config(name)
    described, found = described_family(config.model_type), derive_links(config)
    assert linked_family(config) is described
    for index in range(config.num_hidden_layers):
        assert found.in_block(index).links == described.links
        assert found.in_block(index).attention == described.attention
    assert Heads.of(config, found) == Heads.of(config, described)
    assert not found.left


def test_norms_that_others_read_are_left_alone() -> None:
    family = derive_links(tiny_config("opt_projected"))  # whose norms write the residual stream
    assert kinds_in(family) == ["R2 R3 R5"] * 3
    reasons = {path: why for _, path, why in family.left}
    assert reasons["self_attn.q_proj"] == NO_NORM
    assert reasons["fc1"] == MORE_READERS


def test_one_norm_may_feed_attention_and_mlp() -> None:
    links = derive_links(tiny_config("falcon_old")).block_links[0]
    readers = ("self_attention.query_key_value", "mlp.dense_h_to_4h")
    assert links[0] == Link("R1", "gather", ("input_layernorm",), readers)
    assert [link.kind for link in links] == ["R1", "R5"]


def test_blocks_may_differ() -> None:
    types = ["conv", "full_attention"]
    family = found_in("lfm2", num_hidden_layers=2, layer_types=types)
    assert family.block_attention == ("", "self_attn")
    assert kinds_in(family) == ["R1 R4 R5", "R1 R2 R3 R4 R5"]
    assert (0, "conv.out_proj", UNPROVED) in family.left
    assert family.attends


def test_experts_are_left_alone() -> None:
    family = found_in("qwen3_moe", 1)
    assert kinds_in(family) == ["R1 R2 R3"]
    assert family.left == ((0, "mlp.experts", EXPERTS),)


def test_attention_that_computes_more_is_left_alone() -> None:
    family = found_in("gpt_oss", 1)  # whose probabilities share their sum with a sink
    assert family.block_attention == ("",)
    assert not family.attends
    assert kinds_in(family) == ["R1 R2 R3"]


def test_heads_that_differ_between_blocks_have_no_values_to_reorder() -> None:
    found = derive_links(specimen_config("gemma4_unified_text"))
    kinds = {link.kind for links in found.block_links for link in links}
    assert kinds
    assert "R3" not in kinds
