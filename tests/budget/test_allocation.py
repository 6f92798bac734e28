"""Budgets: what is chosen under a price, and what a probe predicts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantine import Calibration, Plan, quantize
from quantine.budget.allocation import choose
from quantine.budget.probe import Budgeted, Options, probe
from quantine.calibrate.block_loader import BlockLoader
from quantine.core.spec import QuantSpec
from quantine.methods.spqr import SAMPLED_RUNS, SpQR, sampled_rows
from quantine.run.prepare import prepare
from samples import correlated_inputs, observed, quick, random_weight

options = st.lists(st.tuples(st.integers(1, 1000), st.floats(1e-9, 10.0)), min_size=1, max_size=4)
tables = st.dictionaries(st.sampled_from("abcde"), options, min_size=1)


def cost(table: dict[str, Options], chosen: dict[str, int]) -> tuple[int, float]:
    picked = [table[name][index] for name, index in chosen.items()]
    return sum(nbytes for nbytes, _ in picked), sum(loss for _, loss in picked)


@quick
@given(table=tables, share=st.floats(0.0, 1.2))
def test_what_is_chosen_fits_and_nothing_as_small_is_better(
    table: dict[str, Options], share: float
) -> None:
    least = sum(min(nbytes for nbytes, _ in found) for found in table.values())
    most = sum(max(nbytes for nbytes, _ in found) for found in table.values())
    budget = round(least + share * (most - least))
    chosen = choose(table, budget)
    assert chosen.keys() == table.keys()
    nbytes, loss = cost(table, chosen)
    assert nbytes <= budget
    for indices in product(*(range(len(found)) for found in table.values())):
        other = cost(table, dict(zip(table, indices, strict=True)))
        # Prices reach every choice on the lower hull: none in as few bytes loses less.
        assert other[0] > nbytes or other[1] >= loss * (1 - 1e-6)


def test_a_budget_for_everything_buys_the_best() -> None:
    table: dict[str, Options] = {"a": [(10, 5.0), (20, 1.0)], "b": [(10, 3.0), (40, 2.9)]}
    assert choose(table, 60) == {"a": 1, "b": 1}
    assert choose(table, 59) == {"a": 1, "b": 0}
    assert choose(table, 20) == {"a": 0, "b": 0}
    assert choose(table, 1) == {"a": 0, "b": 0}


def test_a_probe_ranks_more_bits_above_fewer(
    tiny: Callable[[str], Path], short: Calibration, tmp_path: Path
) -> None:
    plan = Plan.from_dict(
        {
            "bits_per_weight": 4.0,
            "choices": [{"method": "spqr", "bits": bits} for bits in (2, 3, 4, 6)],
            "rules": [{"match": "@blocks", "method": "search"}],
        }
    )
    job = prepare(tiny("llama"), plan, short)
    checkpoint = job.checkpoint()
    budgeted = [Budgeted(d.layer, d.choices) for d in job.scheme_layers()]
    notes: list[str] = []
    with BlockLoader(job.model, job.family, checkpoint, job.device) as loader:
        table = probe(
            job.calibration_setup(checkpoint, resumes=True),
            loader,
            budgeted,
            job.observed,
            partial(job.read, checkpoint),
            tmp_path,
            0,
            notes.append,
        )
    ways = [(1, "forward"), (2, "forward"), (2, "backward"), (1, "backward")]
    assert notes == [f"probing block {number}/2 {way}" for number, way in ways]
    assert set(table) == {d.layer.name for d in job.scheme_layers()}
    for found in table.values():
        sizes, losses = zip(*found, strict=True)
        assert list(sizes) == sorted(sizes)
        assert list(losses) == sorted(losses, reverse=True)
        assert losses[-1] > 0


def test_a_budget_may_choose_between_axes(
    tiny: Callable[[str], Path], short: Calibration, tmp_path: Path
) -> None:
    both = [
        {"method": "spqr", "bits": bits, "group_size": 16, "scale_bits": scale, "group_axis": axis}
        for bits, scale in ((3, 16), (4, 3))
        for axis in ("in", "out")
    ]
    plan = Plan.from_dict(
        {
            "bits_per_weight": 6.0,
            "choices": both,
            "rules": [{"match": "@blocks", "method": "search"}],
        }
    )
    report = quantize(tiny("llama"), tmp_path / "out", plan, short).report
    assert report["totals"]["bits_per_weight"] <= 6.0
    axes = {layer["scheme"]["group_axis"] for layer in report["layers"]}
    assert axes == {"in", "out"}


@pytest.mark.parametrize("scale_bits", [16, 4])
def test_predictions_along_outputs_are_near_what_solving_gives(scale_bits: int) -> None:
    weight, hessian = random_weight(64, 96), observed(correlated_inputs(96, 400))
    spec = QuantSpec(3, 16, scale_bits=scale_bits, group_axis="out")
    solver = SpQR(threshold=0.5)
    losses, share = solver.predict(weight, hessian, spec)
    solved = solver(weight, hessian, spec)
    assert losses.shape == (64,)
    error = hessian.error_energy(solved.dequantize() - weight)
    # Weights that feedback has moved fit their grids better than the original ones.
    assert error / 2 <= float(losses.sum()) * hessian.tokens <= 2 * error
    assert solved.outliers is not None
    assert share == pytest.approx(solved.outliers.entries / weight.numel(), rel=0.35)


def test_samples_keep_runs_of_rows_together() -> None:
    rows = sampled_rows(576, 64).view(-1, 64)
    assert len(rows) >= SAMPLED_RUNS
    assert bool((rows[:, 0] % 64 == 0).all())
    assert bool((rows.diff(dim=1) == 1).all())
    assert sampled_rows(48, 48).tolist() == list(range(48))
    assert sampled_rows(640, 1).tolist() == list(range(0, 640, 10))
