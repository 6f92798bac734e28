"""Grids that a search chooses from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from quantine.activations.grids import StaticGrid
from quantine.activations.install import ATTENDED, RoundingPoint, rounding_points
from quantine.core.activation_spec import ActivationSpec
from quantine.families import described_family
from quantine.families.layers import block_list
from quantine.plan.shorthand import parse_shorthand
from quantine.rptq.choose_grids import REACHES, Candidates
from quantine.rptq.reordering import Heads, Reordering
from quantine.statistics.channel_ranges import ChannelRanges
from tiny_models import random_model, tiny_config

LLAMA = described_family("llama")
PLACES = {place.site: place for place in rounding_points(LLAMA)}


def llama() -> tuple[Any, Heads]:
    model = random_model(tiny_config("llama"))
    return block_list(model, LLAMA)[0], Heads.of(tiny_config("llama"), LLAMA)


def width_at(block: Any, place: RoundingPoint) -> int:
    """Channels at a place."""
    if place.site not in ATTENDED:
        return int(block.get_submodule(place.path).weight.shape[1])
    matrix = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}[place.site]
    return len(block.get_submodule(f"self_attn.{matrix}").weight)


def shown(width: int, seed: int) -> ChannelRanges:
    """Six samples of which all first tokens are the same: small, and on no step of a grid."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 40, width, generator=generator) * torch.logspace(-1, 1, width)
    x[:, 0] = x[0, 0] * 0.1
    seen = ChannelRanges(width)
    seen.update(x, 6)
    return seen


def reordering(block: Any, heads: Heads, spec: ActivationSpec) -> Reordering:
    ranges = {
        place.path: shown(width_at(block, place), seed)
        for seed, place in enumerate(rounding_points(LLAMA))
    }
    found = Reordering(LLAMA, heads, spec, ranges, held_out=2)
    found.apply(block)
    return found


@pytest.mark.parametrize("site", ["key", "value"])
@pytest.mark.parametrize("bits", [3, 4])
def test_what_every_sample_begins_with_can_be_rounded_without_error(site: str, bits: int) -> None:
    block, heads = llama()
    made = reordering(block, heads, parse_shorthand("W4A4").activations)
    labels = made.clusters_at(PLACES[site]).labels
    first = made.ranges_at(PLACES[site]).firsts[:1]
    errors = []
    for found in Candidates(made, block).of(PLACES[site], bits, final=True):
        assert found.reach is None  # a cache holds no factors
        grid = StaticGrid(bits, found.scale, found.zero, labels.int(), found.feedback)
        errors.append(float((grid(first) - first).square().mean()))
    assert min(errors) < 1e-8 < 1e-4 < sorted(errors)[1]


def test_queries_meet_keys_one_by_one_and_need_no_such_grid() -> None:
    block, heads = llama()
    made = reordering(block, heads, parse_shorthand("W4A4").activations)
    candidates = Candidates(made, block).of(PLACES["query"], 4, final=True)
    assert all(torch.equal(found.zero, found.zero.round()) for found in candidates)


@pytest.mark.parametrize("site", ["norm", "attention", "hidden"])
@pytest.mark.parametrize("wanted", [True, False])
def test_inputs_of_matrices_may_have_factors(site: str, wanted: bool) -> None:
    block, heads = llama()
    spec = replace(parse_shorthand("W4A4").activations, token_factors=wanted)
    made = reordering(block, heads, spec)
    candidates = Candidates(made, block).of(PLACES[site], 4, final=True)
    reached = {None if one.reach is None else round(float(one.reach), 6) for one in candidates}
    assert reached == {None, *(REACHES if wanted else ())}
    for found in candidates:
        # Factors need zero to have a code.
        assert found.reach is None or bool(((found.zero >= 0) & (found.zero <= 15)).all())


@pytest.mark.parametrize("scheme", ["W4A8", "W4A4", "W4A8-tensor", "W4A8-faithful"])
def test_at_eight_bits_loud_sites_have_factors(scheme: str) -> None:
    block, heads = llama()
    spec = parse_shorthand(scheme).activations
    made = reordering(block, heads, spec)
    with_factors = {
        site
        for site in PLACES
        if getattr(spec, site) == 8 and made.grid(PLACES[site], 8).reached() is not None
    }
    assert with_factors == ({"attention", "hidden"} if scheme == "W4A8" else set())


def test_values_have_clusters_of_their_own_or_those_of_what_attention_makes_of_them() -> None:
    block, heads = llama()
    spec = parse_shorthand("W4A4").activations
    own = reordering(block, heads, spec).clusters_at(PLACES["value"])
    assert set(own.sizes) == {1}
    block, heads = llama()
    made = reordering(block, heads, replace(spec, value_clusters=2))
    assert len(made.clusters_at(PLACES["value"]).sizes) == 2 * heads.keys
    block, heads = llama()
    made = reordering(block, heads, replace(spec, value_clusters=None))
    shared = made.clusters_at(PLACES["value"])
    assert len(shared.sizes) == min(4, len(shared.labels) // heads.keys) * heads.keys
    expected = shared.shared(heads.keys, heads.copies)
    assert torch.equal(made.clusters_at(PLACES["attention"]).labels, expected.labels)
