"""Requests for one weight: what is refused, and what a group is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantine.core.spec import QuantSpec, check_choice, nearest_group_sizes
from quantine.errors import PlanError
from samples import quick


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "bits must be 2 to 8, not 1"),
        ({"bits": 9}, "bits must be 2 to 8, not 9"),
        ({"bits": 4.0}, "bits must be a whole number, not 4.0"),
        ({"bits": True}, "bits must be a whole number, not True"),
        ({"group_size": -2}, "group_size must be positive, or -1 for the whole line, not -2"),
        (
            {"group_size": 2**64 - 1},
            "group_size must be at most 2147483647, not 18446744073709551615",
        ),
        ({"stat_group_size": 2**31}, "stat_group_size must be at most 2147483647, not 2147483648"),
        ({"group_size": "64"}, "group_size must be a whole number, not '64'"),
        ({"sym": 1}, "sym must be true or false, not 1"),
        ({"scale_bits": 1}, "scale_bits must be 2 to 8, or 16, not 1"),
        ({"scale_bits": 0}, "scale_bits must be 2 to 8, or 16, not 0"),
        ({"scale_bits": 9}, "scale_bits must be 2 to 8, or 16, not 9"),
        ({"scale_bits": None}, "scale_bits must be a whole number, not None"),
        ({"zero_bits": 1}, "zero_bits must be 0, 2 to 8, or 16, not 1"),
        ({"zero_bits": 15}, "zero_bits must be 0, 2 to 8, or 16, not 15"),
        ({"zero_bits": False}, "zero_bits must be a whole number, not False"),
        (
            {"stat_group_size": 0},
            "stat_group_size must be positive, or -1 for all lines, not 0",
        ),
        ({"stat_group_size": 1.5}, "stat_group_size must be a whole number, not 1.5"),
        (
            {"sym": True, "zero_bits": 3},
            "zero_bits 3 and sym exclude each other: a symmetric grid has no zero points to store",
        ),
    ],
)
def test_refusals_name_the_field_and_the_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as refused:
        QuantSpec(**fields)
    assert str(refused.value) == message


def test_minus_one_is_the_whole_row() -> None:
    assert QuantSpec(group_size=-1).group_length(96) == 96
    assert QuantSpec(group_size=32).group_length(96) == 32


def test_statistics_of_runs_of_outputs_or_of_all() -> None:
    assert QuantSpec(stat_group_size=-1).stat_group_length(96) == 96
    assert QuantSpec(stat_group_size=16).stat_group_length(96) == 16
    assert QuantSpec(stat_group_size=64).stat_group_length(20) == 64  # the only run is shorter


@pytest.mark.parametrize(
    ("scale_bits", "zero_bits", "second_level"),
    [(16, 0, False), (16, 16, False), (4, 0, True), (16, 3, True), (3, 3, True), (8, 16, True)],
)
def test_second_level_means_statistics_as_codes(
    scale_bits: int, zero_bits: int, second_level: bool
) -> None:
    spec = QuantSpec(scale_bits=scale_bits, zero_bits=zero_bits)
    assert spec.second_level == second_level


@quick
@given(in_features=st.integers(1, 500), group_size=st.one_of(st.just(-1), st.integers(1, 600)))
def test_divides_means_that_groups_tile_the_row(in_features: int, group_size: int) -> None:
    whole_groups = group_size == -1 or group_size in {
        d for d in range(1, in_features + 1) if d * (in_features // d) == in_features
    }
    assert QuantSpec(group_size=group_size).divides(in_features) == whole_groups


def test_nearest_group_sizes_by_hand() -> None:
    assert nearest_group_sizes(576, 128) == [72, 96, 144]
    assert nearest_group_sizes(7, 64) == [1, 7]


@quick
@given(in_features=st.integers(1, 400), group_size=st.integers(1, 400), count=st.integers(1, 4))
def test_no_divisor_left_out_is_nearer(in_features: int, group_size: int, count: int) -> None:
    sizes = nearest_group_sizes(in_features, group_size, count)
    divisors = [d for d in range(1, in_features + 1) if in_features % d == 0]
    assert sizes == sorted(set(sizes))
    assert len(sizes) == min(count, len(divisors))
    assert set(sizes) <= set(divisors)
    farthest = max(abs(size - group_size) for size in sizes)
    assert all(abs(d - group_size) >= farthest for d in divisors if d not in sizes)


def test_check_choice_names_the_choices() -> None:
    check_choice("clip", "mse", ("minmax", "mse"))
    with pytest.raises(PlanError, match=r"clip must be one of minmax, mse, not \['mse'\]"):
        check_choice("clip", ["mse"], ("minmax", "mse"))
