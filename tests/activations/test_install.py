"""Blocks get back what a run gave them, from tensors that the run stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quantine import FormatError
from quantine.activations.grids import StaticGrid
from quantine.activations.install import rebuild_block, rounding_points
from quantine.activations.modules import AttentionSites, PermutedNorm
from quantine.core.activation_spec import ActivationSpec
from quantine.families import described_family
from quantine.families.layers import block_list
from tiny_models import WIDTH, random_model, tiny_config

PATH = "model.layers.0"
FAMILY = described_family("llama")
SPEC = ActivationSpec(norm=8, attention=8, hidden=8, query=8, key=8, value=8, softmax=8)


def stored(name: str) -> Tensor | None:
    """Tensors of a block whose grids have two clusters of channels, and nothing that few have."""
    kinds = {
        "order": torch.arange(WIDTH, dtype=torch.int32).flip(0),
        "scale": torch.tensor([0.5, 2.0]),
        "zero": torch.tensor([1.0, 3.0]),
        "labels": torch.zeros(WIDTH, dtype=torch.int32),
    }
    owner, _, kind = name.rpartition(".")
    assert owner.startswith(f"{PATH}.")
    return kinds.get(kind)


def block() -> nn.Module:
    return block_list(random_model(tiny_config("llama")), FAMILY)[0]


def test_sites_norms_and_grids_are_those_that_were_stored() -> None:
    rebuilt = block()
    weights = dict(rebuilt.named_parameters())
    rebuild_block(rebuilt, PATH, FAMILY, SPEC, stored)
    modules = dict(rebuilt.named_modules())
    grids = {path: m for path, m in modules.items() if isinstance(m, StaticGrid)}
    assert grids.keys() == {place.grid for place in rounding_points(FAMILY)}
    assert all(grid.get_buffer("zero").tolist() == [1.0, 3.0] for grid in grids.values())
    norms = [m for m in modules.values() if isinstance(m, PermutedNorm)]
    gathered = [p for link in FAMILY.links if link.fold == "gather" for p in link.producers]
    assert len(norms) == len(gathered) > 0
    assert all(norm.get_buffer("order").tolist()[:2] == [WIDTH - 1, WIDTH - 2] for norm in norms)
    sites = [m for m in modules.values() if isinstance(m, AttentionSites)]
    assert [one.softmax for one in sites] == [8]
    kept = dict(rebuilt.named_parameters())
    assert {id(weight) for weight in weights.values()} == {id(weight) for weight in kept.values()}


def test_missing_tensors_are_refused_by_name_but_for_those_that_few_grids_have() -> None:
    asked: list[str] = []

    def noted(name: str) -> Tensor | None:
        asked.append(name)
        return stored(name)

    rebuild_block(block(), PATH, FAMILY, SPEC, noted)
    needed = [name for name in asked if name.rpartition(".")[2] not in StaticGrid.optional_names]
    assert len(needed) < len(asked)
    for missing in needed:
        with pytest.raises(FormatError, match=rf"activations are rounded, but .* holds {missing}$"):
            rebuild_block(
                block(),
                PATH,
                FAMILY,
                SPEC,
                lambda name, gone=missing: None if name == gone else stored(name),
            )
