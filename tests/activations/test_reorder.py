"""Reorders change no logit; half a reorder does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantine.activations.attention import NAME, register
from quantine.activations.install import add_sites
from quantine.activations.modules import PermutedNorm
from quantine.activations.reorder import reorder
from quantine.core.activation_spec import REORDERS, ActivationSpec
from quantine.families import described_family
from quantine.families.family import Family, Link
from quantine.families.heads import Heads
from quantine.families.layers import block_list, is_transposed
from tiny_models import FAMILIES, VOCAB, random_model, tiny_config

LINKED = [
    name
    for name in FAMILIES
    if all(
        getattr(tiny_config(name), field) == value
        for field, value in described_family(tiny_config(name).model_type).links_need
    )
    and described_family(tiny_config(name).model_type).links
]
ROUNDED = [name for name in LINKED if described_family(tiny_config(name).model_type).attention]
CASES = [
    (name, link.kind)
    for name in LINKED
    for link in described_family(tiny_config(name).model_type).links
]
TOKENS = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(5))


def order_of(channels: int, heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    width = channels // heads
    local = [torch.randperm(width, generator=generator) + h * width for h in range(heads)]
    return torch.cat(local)


def channels_of(block: Any, link: Link, heads: Heads) -> int:
    """Channels that a reorder is about: as many as its first consumer reads of one head's copy."""
    if not link.consumers:
        return len(block.get_submodule(link.producers[1]).weight)
    reader = block.get_submodule(link.consumers[0])
    inputs = int(reader.weight.shape[0 if is_transposed(reader) else 1])
    return inputs // heads.copies if link.per_head else inputs


def rewrite(model: Any, family: Family, link: Link, heads: Heads, half: Link | None = None) -> None:
    """Reorder along ``link``, or along ``half`` of it."""
    if link.fold == "attention":
        return  # nothing moves
    for index, block in enumerate(block_list(model, family)):
        count = heads.keys if link.per_head else 1
        channels = channels_of(block, link, heads)
        reorder(block, half or link, order_of(channels, count, index), count)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=TOKENS).logits
    return logits


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", LINKED)
def test_all_reorders_together_change_no_logit(name: str) -> None:
    model = random_model(tiny_config(name))
    expected = logits_of(model)
    family = described_family(model.config.model_type)
    for link in family.links:
        rewrite(model, family, link, Heads.of(model.config, family))
    assert any(isinstance(module, PermutedNorm) for module in model.modules())
    assert relative(logits_of(model), expected) < 1e-5


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_half_a_reorder_changes_logits(name: str, kind: str) -> None:
    model = random_model(tiny_config(name))
    expected = logits_of(model)
    family = described_family(model.config.model_type)
    link = next(one for one in family.links if one.kind == kind)
    if link.fold == "attention":
        return  # nothing moves
    half = (
        replace(link, consumers=())
        if link.consumers
        else replace(link, producers=link.producers[:1])
    )
    rewrite(model, family, link, Heads.of(model.config, family), half)
    assert relative(logits_of(model), expected) > 1e-3


@pytest.mark.parametrize("name", ROUNDED)
def test_the_registered_attention_is_the_models_own(name: str) -> None:
    model = random_model(tiny_config(name))
    expected = logits_of(model)
    family = described_family(model.config.model_type)
    for block in block_list(model, family):
        add_sites(block, family, ActivationSpec())
    register()
    model.set_attn_implementation(NAME)
    assert relative(logits_of(model), expected) < 1e-5


@pytest.mark.parametrize("name", LINKED)
def test_families_name_every_reorder_once(name: str) -> None:
    family = described_family(tiny_config(name).model_type)
    assert tuple(link.kind for link in family.links) == REORDERS
    assert all(
        link.consumers for link in family.links if link.fold != "attention" and not link.per_head
    )
