"""The table of architectures, and what happens to a model that does not match its row."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from quantine.errors import FamilyError
from quantine.families import FAMILIES, described_family
from quantine.families.family import Family
from quantine.families.layers import Layer, block_list, find_layers

each = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def test_no_model_type_and_no_name_is_claimed_twice() -> None:
    types = [kind for family in FAMILIES for kind in family.model_types]
    assert len(types) == len(set(types))
    names = [family.name for family in FAMILIES]
    assert len(names) == len(set(names))


@each
def test_a_family_is_found_by_each_of_its_model_types(family: Family) -> None:
    assert family.model_types
    for model_type in family.model_types:
        assert described_family(model_type) is family


@each
def test_a_family_lives_in_the_file_of_its_name(family: Family) -> None:
    module = importlib.import_module(f"quantine.families.{family.name}")
    assert getattr(module, family.name.upper()) is family


@each
def test_no_matrix_is_in_two_groups(family: Family) -> None:
    paths = [path for group in family.groups for path in group]
    assert all(family.groups)
    assert len(paths) == len(set(paths))


@each
def test_paths_are_module_paths(family: Family) -> None:
    paths = [path for group in family.groups for path in group]
    for path in (*paths, family.blocks, family.embedding, family.head):
        assert all(part.isidentifier() for part in path.split("."))


@each
def test_transformers_knows_every_model_type(family: Family) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert set(family.model_types) <= set(CONFIG_MAPPING_NAMES)


@pytest.mark.parametrize("model_type", ["mixtral", "mamba", "", "Llama"])
def test_other_model_types_are_refused_with_the_list(model_type: str) -> None:
    with pytest.raises(FamilyError) as refused:
        described_family(model_type)
    message = str(refused.value)
    assert f"model type {model_type!r} is not described" in message
    assert all(kind in message for family in FAMILIES for kind in family.model_types)


TOY = Family(
    name="toy",
    model_types=("toy",),
    blocks="layers",
    groups=(("attn.q", "attn.k"), ("mlp",)),
    embedding="embed",
)


class Conv1D(nn.Module):
    """Stores its weight as [in, out], like the module of GPT-2 by this name."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(in_features, out_features))


def toy_block() -> nn.Module:
    block = nn.Module()
    block.attn = nn.Module()
    block.attn.q = nn.Linear(8, 12)
    block.attn.k = nn.Linear(8, 4, bias=False)
    block.norm = nn.LayerNorm(8)
    block.mlp = Conv1D(6, 8)
    return block


def toy_model(*blocks: nn.Module) -> nn.Module:
    model = nn.Module()
    model.embed = nn.Embedding(20, 8)
    model.layers = nn.ModuleList(blocks)
    model.lm_head = nn.Linear(8, 20, bias=False)
    return model


def test_layers_in_running_order_with_their_shapes() -> None:
    assert find_layers(toy_model(toy_block(), toy_block()), TOY) == [
        Layer("embed", 20, 8, "embedding"),
        Layer("layers.0.attn.q", 12, 8, "block", 0, 0),
        Layer("layers.0.attn.k", 4, 8, "block", 0, 0),
        Layer("layers.0.mlp", 6, 8, "block", 0, 1, transposed=True),
        Layer("layers.1.attn.q", 12, 8, "block", 1, 0),
        Layer("layers.1.attn.k", 4, 8, "block", 1, 0),
        Layer("layers.1.mlp", 6, 8, "block", 1, 1, transposed=True),
        Layer("lm_head", 20, 8, "head"),
    ]


def test_shapes_are_found_without_weights() -> None:
    with torch.device("meta"):
        model = toy_model(toy_block())
    assert find_layers(model, TOY)[1].weights == 12 * 8


def test_a_matrix_that_the_family_does_not_name_is_refused() -> None:
    block = toy_block()
    block.attn.extra = nn.Linear(8, 3)
    with pytest.raises(FamilyError, match=r"layers\.1\.attn\.extra\.weight \(3, 8\) in a Linear"):
        find_layers(toy_model(toy_block(), block), TOY)


def test_fused_experts_are_refused() -> None:
    block = toy_block()
    block.experts = nn.Module()
    block.experts.gate_up = nn.Parameter(torch.zeros(4, 16, 8))
    with pytest.raises(FamilyError, match=r"experts\.gate_up \(4, 16, 8\) in a Module is not"):
        find_layers(toy_model(block), TOY)


def test_a_missing_matrix_is_named() -> None:
    block = toy_block()
    del block.attn.k
    with pytest.raises(FamilyError, match=r"'toy' expects layers\.0\.attn\.k, which does not"):
        find_layers(toy_model(block), TOY)


def test_a_matrix_of_another_kind_is_named() -> None:
    block = toy_block()
    block.mlp = nn.Bilinear(2, 3, 4)
    with pytest.raises(FamilyError, match=r"layers\.0\.mlp is a Bilinear"):
        find_layers(toy_model(block), TOY)


def test_blocks_must_be_a_list() -> None:
    model = toy_model()
    model.layers = nn.Linear(1, 1)
    with pytest.raises(FamilyError, match="layers is a Linear, not a list of blocks"):
        block_list(model, TOY)
