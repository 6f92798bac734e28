"""Confidence intervals: exact cases, and how often they hold the truth."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantine.eval.interval import perplexity_recovery, score_recovery, t_quantile

LOSSES = st.lists(st.tuples(st.floats(0, 20), st.floats(0, 20)), min_size=1, max_size=30)
ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(3, 3.1824), (4, 2.7764), (7, 2.3646), (23, 2.0687), (99, 1.9842), (10**6, 1.9600)],
)
def test_quantiles_against_the_printed_table(freedom: int, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, rel=0.01)


@given(pairs=LOSSES)
def test_recovery_of_perplexity_is_the_ratio_of_perplexities(
    pairs: list[tuple[float, float]],
) -> None:
    own, other = zip(*pairs, strict=True)
    found = perplexity_recovery(own, other)
    ratio = math.exp(sum(other) / len(other)) / math.exp(sum(own) / len(own))
    assert found.value == pytest.approx(ratio, rel=1e-9)
    assert (found.low is None) == (len(pairs) < 4)
    if found.low is not None and found.high is not None:
        assert found.low <= found.value <= found.high


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_model_that_predicts_nothing_recovers_nothing(loss: float) -> None:
    found = perplexity_recovery([3.0, loss, 3.0, 3.0, 3.0], [3.0] * 5)
    assert found.value == 0
    assert found.low is None


@given(pairs=ANSWERS)
def test_recovery_of_a_score_is_the_ratio_of_scores(pairs: list[tuple[bool, bool]]) -> None:
    own, other = ([float(value) for value in side] for side in zip(*pairs, strict=True))
    found = score_recovery(own, other)
    if not any(other):
        assert found is None
        return
    assert found is not None
    assert found.value == pytest.approx(sum(own) / sum(other))
    if own == other and found.low is not None:
        assert found.low == found.value == found.high == 1


def test_what_both_find_hard_is_no_doubt_about_the_difference() -> None:
    own = [1.01, 2.01, 3.01, 4.01, 5.01]
    found = perplexity_recovery(own, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low < 1e-9
    assert found.value == pytest.approx(math.exp(-0.01))


@pytest.mark.parametrize("kind", ["perplexity", "score"])
def test_19_of_20_intervals_hold_the_truth(kind: str) -> None:
    generator = random.Random(3)
    held, rounds = 0, 600
    for _ in range(rounds):
        if kind == "perplexity":
            other = [generator.gauss(3, 0.5) for _ in range(8)]
            own = [loss + generator.gauss(0.05, 0.02) for loss in other]
            found, truth = perplexity_recovery(own, other), math.exp(-0.05)
        else:
            other = [float(generator.random() < 0.6) for _ in range(150)]
            own = [
                x if generator.random() < 0.8 else float(generator.random() < 0.3) for x in other
            ]
            ratio, truth = score_recovery(own, other), (0.8 * 0.6 + 0.2 * 0.3) / 0.6
            assert ratio is not None
            found = ratio
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
    assert 0.92 < held / rounds < 0.98
