"""Schemes by name, and what is refused."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from quantine import Plan
from quantine.core.activation_spec import ActivationSpec, activations_from
from quantine.errors import PlanError
from quantine.plan.shorthand import parse_shorthand

SITES = ("norm", "query", "key", "value", "attention", "hidden", "softmax")


@pytest.mark.parametrize(
    ("name", "weights", "bits"),
    [
        ("W4A16", 4, (16, 16, 16, 16, 16, 16, 16)),
        ("W4A8", 4, (8, 8, 8, 8, 8, 8, 8)),
        ("W4A4", 4, (8, 4, 4, 4, 4, 4, 8)),
        ("W4A4-strict", 4, (4, 4, 4, 4, 4, 4, 8)),
        ("W3A3KV", 3, (16, 16, 3, 3, 16, 16, 16)),
        ("W16A4-token", 16, (8, 4, 4, 4, 4, 4, 8)),
        ("W8A8-tensor-faithful", 8, (8, 8, 8, 8, 8, 8, 8)),
    ],
)
def test_names_say_the_bits_of_every_site(name: str, weights: int, bits: tuple[int, ...]) -> None:
    found = parse_shorthand(name)
    assert found.weight_bits == weights
    assert tuple(asdict(found.activations)[site] for site in SITES) == bits
    assert found.faithful == ("faithful" in name)


def test_suffixes_choose_grids() -> None:
    assert parse_shorthand("W4A4").activations.range == "search"
    assert parse_shorthand("W4A4-faithful").activations.range == "running"
    assert parse_shorthand("W4A4-token").activations.granularity == "token"
    assert parse_shorthand("W4A4-tensor").activations.clusters_of("R1") == 1
    assert parse_shorthand("W4A4").activations.clusters == (32, 256, 4, 32, 32)
    assert parse_shorthand("W4A4").activations.value_clusters == 256
    assert parse_shorthand("W4A4-faithful").activations.value_clusters is None
    assert parse_shorthand("W4A4-faithful").activations.clusters == (32, 4, 4, 32, 32)
    assert parse_shorthand("W4A4").activations.relative
    assert not parse_shorthand("W4A4-faithful").activations.relative
    assert parse_shorthand("W4A4").activations.rotated == ()
    assert parse_shorthand("W4A4-rotated").activations.rotated == ("attention", "hidden", "value")
    strict = parse_shorthand("W4A4-strict-rotated").activations
    assert strict.rotated == ("norm", "attention", "hidden", "value")
    assert [strict.clusters_of(kind) for kind in ("R1", "R2", "R3", "R5")] == [1, 256, 1, 1]


@pytest.mark.parametrize(
    "name", ["W4", "w4a4", "W04A4", "W4A04", "W4A4KB", "W4A4-", "W4A4-loud", "W4A4-token-tensor"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(PlanError, match="scheme must be like W4A8"):
        parse_shorthand(name)


@pytest.mark.parametrize("name", ["W4A8-rotated", "W4A8KV-rotated", "W4A16-rotated"])
def test_there_has_to_be_something_to_rotate(name: str) -> None:
    with pytest.raises(PlanError, match="nothing to rotate: leave out -rotated"):
        parse_shorthand(name)


@pytest.mark.parametrize("name", ["W4A4-rotated-token", "W4A4-tensor-rotated"])
def test_rotated_inputs_have_grids_of_clusters(name: str) -> None:
    with pytest.raises(PlanError, match=f"scheme {name}: rotated inputs have grids of clusters"):
        parse_shorthand(name)


@pytest.mark.parametrize("name", ["W1A4", "W9A8", "W4A1", "W4A12"])
def test_bits_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(PlanError, match="2 to 8"):
        parse_shorthand(name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": 9}, "norm must be 2 to 8 bits"),
        ({"key": True}, "key must be 2 to 8"),
        ({"clusters": (32, 4)}, "clusters must be 5 positive numbers"),
        ({"clusters": (32, 4, 0, 1, 1)}, "clusters must be 5"),
        ({"granularity": "row"}, "granularity"),
        ({"range": "best"}, "range"),
        ({"outputs": 4}, "keys among"),
        ({"clusters": 4}, "must be a list"),
        ({"value_clusters": 0}, "value_clusters must be a positive number"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        activations_from(fields, "plan 'p'")


def test_plain_values_invert() -> None:
    spec = ActivationSpec(norm=8, key=3, clusters=(8, 2, 2, 8, 16), range="minmax")
    assert activations_from(spec.as_dict(), "x") == spec
    plan = Plan.scheme("W4A4KV", damp=0.05)
    assert Plan.from_dict(plan.as_dict()) == plan
    rules = [{"match": "@blocks", "method": "rtn", "group_size": 0}]
    assert Plan.from_dict({"rules": rules, "scheme": "W4A8"}).activations == (
        Plan.scheme("W4A8").activations
    )


def test_schemes_choose_how_weights_are_rounded() -> None:
    (rule,) = Plan.scheme("W4A4").rules
    assert rule.as_dict()["group_size"] == 0
    assert rule.as_dict()["act_order"] is True
    (rule,) = Plan.scheme("W3A8-faithful").rules
    assert (rule.as_dict()["bits"], rule.as_dict()["act_order"]) == (3, False)
    (rule,) = Plan.scheme("W4A4", method="spqr", group_size=32).rules
    assert rule.as_dict()["method"] == "spqr"
    (rule,) = Plan.scheme("W16A8").rules
    assert rule.scheme is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"scheme": "W4A4", "activations": {"key": 4}}, "give either"),
        ({"scheme": "W4A4", "float_inputs": True}, "do not go with `float_inputs`"),
        (
            {"rules": [{"match": "@blocks", "method": "spqr", "group_size": 0}]},
            "group_size 0",
        ),
    ],
)
def test_plans_that_contradict_themselves_are_refused(value: dict[str, Any], message: str) -> None:
    rules = [{"match": "@blocks", "method": "rtn"}]
    with pytest.raises(PlanError, match=message):
        Plan.from_dict({"rules": rules, **value})


def test_weights_that_stay_take_no_parameters() -> None:
    with pytest.raises(PlanError, match="leaves weights in 16 bit"):
        Plan.scheme("W16A4", method="gptq")
