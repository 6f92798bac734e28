"""SpQR against the textbook algorithm, and its own promises."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from quantine.core.grid import Statistic
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.errors import PlanError, SolverError
from quantine.formats import format_named
from quantine.kernels.fit.grid_cost import GridCost
from quantine.kernels.fit.reference import without_outliers
from quantine.methods.gptq import GPTQ
from quantine.methods.rtn import RTN
from quantine.methods.spqr import SAMPLED_ROWS, SpQR, sampled_rows
from quantine.statistics.hessian import Hessian
from samples import FAITHFUL, FAITHFUL_SPEC, correlated_inputs, observed, random_weight

ROWS, COLUMNS, TOKENS = 20, 48, 160
LARGEST_SHARE_DIFFERING = 0.01
"""Float32 and float64 may round a tie to different sides; the rest of that row then follows."""


def layer(rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Hessian]:
    return random_weight(rows, columns), observed(correlated_inputs(columns, TOKENS))


def outliers_of(solved: QTensor) -> dict[tuple[int, int], float]:
    """Value by (output, stored column)."""
    kept = solved.outliers
    if kept is None:
        return {}
    places = zip(kept.row_indices().tolist(), kept.columns.tolist(), strict=True)
    return dict(zip(places, kept.values.tolist(), strict=True))


def statistic_codes(stored: object) -> np.ndarray:
    assert isinstance(stored, Statistic)
    return stored.codes.numpy()


def relative_error(solved: QTensor, weight: Tensor, hessian: Hessian) -> float:
    return hessian.error_energy(solved.dequantize() - weight) / hessian.error_energy(weight)


def assert_equals_the_textbook(weight: Tensor, hessian: Hessian, solver: SpQR, bits: int) -> None:
    solved = solver(weight, hessian, replace(FAITHFUL_SPEC, bits=bits))
    expected = oracles.spqr(
        weight.numpy(),
        hessian.matrix.numpy(),
        bits,
        16,
        damp=solver.damp,
        act_order=solver.act_order,
        threshold=solver.threshold,
        stat_bits=(3, 3),
        tile=16,
    )
    order = list(range(weight.shape[1])) if solved.in_perm is None else solved.in_perm.tolist()
    assert order == expected.order
    found, wanted = outliers_of(solved), expected.outliers
    allowed = LARGEST_SHARE_DIFFERING * weight.numel()
    assert len(found.keys() ^ wanted.keys()) <= allowed
    differing = [place for place in found.keys() & wanted.keys() if found[place] != wanted[place]]
    assert len(differing) <= allowed
    inliers = np.ones(weight.shape, bool)
    for place in found.keys() | wanted.keys():
        inliers[place] = False
    assert np.sum((solved.codes.numpy() != expected.codes) & inliers) <= allowed
    for stored, codes in (
        (solved.grid.scale, expected.scale_codes),
        (solved.grid.zero_point, expected.zero_codes),
    ):
        assert np.mean(statistic_codes(stored) != codes) <= LARGEST_SHARE_DIFFERING
    error = oracles.output_error((solved.dequantize() - weight).numpy(), hessian.matrix.numpy())
    best = oracles.output_error(expected.values - weight.numpy(), hessian.matrix.numpy())
    assert error == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("threshold", [0.1, 0.2, 1.0, math.inf])
@pytest.mark.parametrize("act_order", [False, True])
def test_equals_the_textbook(act_order: bool, threshold: float, bits: int) -> None:
    solver = replace(FAITHFUL, act_order=act_order, threshold=threshold)
    assert_equals_the_textbook(*layer(), solver, bits)


@pytest.mark.parametrize("offset", [10.0, 30.0, 100.0, 300.0])
def test_groups_far_from_zero_keep_what_differs_in_them(offset: float) -> None:
    weight, hessian = layer(80, 128)
    spread = weight / weight.std()
    solved = SpQR()(spread + offset, hessian, SpQR.default_spec)
    lost = hessian.error_energy(solved.dequantize() - spread - offset)
    assert lost < 0.01 * hessian.error_energy(spread)


def test_groups_too_far_from_zero_are_refused() -> None:
    weight, hessian = layer(80, 128)
    with pytest.raises(SolverError, match="would be outliers"):
        SpQR()(weight / weight.std() + 1000.0, hessian, SpQR.default_spec)


def test_half_of_the_weights_may_be_outliers() -> None:
    weight, hessian = layer(80, 128)
    solved = SpQR(outliers=0.5)(weight, hessian, QuantSpec(3, 16, scale_bits=3))
    assert solved.outliers is not None
    assert solved.outliers.entries / weight.numel() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("rows", [3, 16, 33])
@pytest.mark.parametrize("columns", [16, 64])
def test_equals_the_textbook_whatever_the_shape(rows: int, columns: int) -> None:
    assert_equals_the_textbook(*layer(rows, columns), FAITHFUL, 3)


def test_equals_the_textbook_with_the_usual_damping() -> None:
    # Little damping: errors of one column move the others far.
    assert_equals_the_textbook(*layer(), replace(FAITHFUL, damp=0.01, block_size=20), 3)


@pytest.mark.parametrize("spec", [QuantSpec(3, 16), QuantSpec(4, -1, sym=True)])
@pytest.mark.parametrize("act_order", [False, True])
def test_without_outliers_and_second_level_it_is_gptq(act_order: bool, spec: QuantSpec) -> None:
    for groups in ("static", "aligned", "refit"):
        shared: dict[str, Any] = {"groups": groups, "act_order": act_order, "clip": "mse"}
        solved, usual = (
            SpQR(threshold=math.inf, **shared)(*layer(), spec),
            GPTQ(**shared)(*layer(), spec),
        )
        assert solved.outliers is None
        assert torch.equal(solved.codes, usual.codes)
        assert torch.equal(solved.grid.scales(), usual.grid.scales())
        assert torch.equal(solved.dequantize(), usual.dequantize())


@pytest.mark.parametrize("price", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("length", [1, 2, 3, 16])
def test_likely_outliers_are_those_of_the_explicit_loop(length: int, price: float) -> None:
    weight = random_weight(24, length)
    weight[::3, 0] *= 6
    weight[1, -1] = weight[1, 0] = weight[1].max()  # the largest weight twice
    spread = torch.linspace(0.2, 1.0, length)
    spec = QuantSpec(3, length, scale_bits=3, zero_bits=3)
    cost = GridCost("minmax", price, look_ahead=True)
    inliers = without_outliers(weight.T.unsqueeze(0), spread.unsqueeze(0), spec, cost)[0].T
    expected = []
    for row in weight.double().tolist():
        likely = oracles.likely_outliers(row, spread.square().tolist(), 3, price)
        expected.append(oracles.without_likely(row, likely))
    assert inliers.numpy() == pytest.approx(np.array(expected), rel=1e-5, abs=1e-8)
    if length == 16 and price < 0.1:
        replaced = (inliers != weight).sum()
        assert 0 < replaced < weight.numel() / 4


@pytest.mark.parametrize("groups", ["static", "aligned", "refit"])
def test_the_wanted_share_of_outliers_is_kept(groups: Any) -> None:
    weight, hessian = random_weight(256, 128), observed(correlated_inputs(128, 400))
    solved = SpQR(outliers=0.02, groups=groups)(weight, hessian, QuantSpec(3, 32, scale_bits=4))
    assert solved.outliers is not None
    assert solved.outliers.entries / weight.numel() == pytest.approx(0.02, rel=0.1)


def test_outliers_replace_their_codes() -> None:
    solved = replace(FAITHFUL, act_order=False)(*layer(), FAITHFUL_SPEC)
    values = solved.dequantize()
    codes = solved.grid.decode(solved.codes)
    kept = outliers_of(solved)
    assert kept
    for place, value in kept.items():
        assert values[place].item() == value
        assert codes[place].item() != value
    inliers = torch.ones_like(values, dtype=torch.bool)
    inliers[tuple(torch.tensor(list(kept)).T)] = False
    assert torch.equal(values[inliers], codes[inliers])


def test_a_planted_outlier_is_kept_and_its_group_gains() -> None:
    weight, hessian = layer()
    weight[5, 20] *= 50 * 0.05 / weight[5, 20].abs()
    others = [c for c in range(16, 32) if c != 20]
    spec = QuantSpec(3, 16)
    kept = SpQR(threshold=0.5)(weight, hessian, spec)
    without = SpQR(threshold=math.inf)(weight, hessian, spec)
    assert (5, 20) in outliers_of(kept)
    error = {
        name: (solved.dequantize() - weight)[5, others].square().sum()
        for name, solved in (("kept", kept), ("without", without))
    }
    assert error["kept"] < 0.2 * error["without"]
    assert relative_error(kept, weight, hessian) < relative_error(without, weight, hessian)
    # Without looking ahead the range covers it: it is an end of the grid and loses nothing.
    simple = SpQR(threshold=0.5, detect="simple", clip="minmax", groups="static")
    assert (5, 20) not in outliers_of(simple(weight, hessian, spec))


def stored_bits(solved: QTensor) -> float:
    tensors = format_named("sparse").pack(solved)
    return 8 * sum(tensor.nbytes for tensor in tensors.values()) / solved.codes.numel()


@pytest.mark.parametrize(("bits", "solver"), [(3, SpQR(threshold=1.0)), (4, SpQR())])
def test_it_beats_minmax_gptq_at_equal_bits(bits: int, solver: SpQR) -> None:
    # Strengths within a factor of ten. Aligned groups lose where strengths differ by a factor of a
    # hundred without any order: strong inputs then wait behind the weak ones of their groups.
    generator = torch.Generator().manual_seed(1)
    mix = torch.eye(256) * 20 + torch.randn(256, 256, generator=generator)
    strength = torch.logspace(-0.5, 0.5, 256)[torch.randperm(256, generator=generator)]
    hessian = observed(torch.randn(600, 256, generator=generator) @ mix * strength)
    weight = random_weight(64, 256)
    spec = QuantSpec(bits, 32, scale_bits=4, stat_group_size=64)
    solved = solver(weight, hessian, spec)
    usual = GPTQ(clip="minmax")(weight, hessian, QuantSpec(bits, 64))
    assert stored_bits(solved) <= stored_bits(usual)
    assert relative_error(solved, weight, hessian) < relative_error(usual, weight, hessian)


SECOND_LEVEL = QuantSpec(4, 16, scale_bits=4, stat_group_size=64)
REQUESTS = [
    pytest.param(FAITHFUL, FAITHFUL_SPEC, id="faithful"),
    pytest.param(replace(FAITHFUL, threshold=math.inf), FAITHFUL_SPEC, id="faithful-no-outliers"),
    pytest.param(SpQR(threshold=math.inf), SECOND_LEVEL, id="no-outliers"),
    pytest.param(SpQR(threshold=0.2), SECOND_LEVEL, id="outliers"),
    pytest.param(SpQR(outliers=0.02), QuantSpec(3, 16), id="share"),
    pytest.param(SpQR(threshold=0.2), QuantSpec(8, 16, scale_bits=8, zero_bits=8), id="8-bit"),
    pytest.param(SpQR(threshold=0.2), QuantSpec(4, 16, zero_bits=16), id="fractional"),
]
"""Every way to store scales and zero points."""
requests = pytest.mark.parametrize(("solver", "spec"), REQUESTS)


@requests
@pytest.mark.parametrize("value", [0.3, -0.3])
def test_equal_weights(solver: SpQR, spec: QuantSpec, value: float) -> None:
    # They differ by rounding only once feedback has moved them: by far less than any scale.
    for noise in (0.0, 1e-7):
        weight = torch.full((ROWS, COLUMNS), value) + random_weight(ROWS, COLUMNS) * noise * 20
        solved = solver(weight, layer()[1], spec)
        assert not outliers_of(solved)
        assert relative_error(solved, weight, layer()[1]) < 1e-5


@requests
def test_zeros_stay_zeros(solver: SpQR, spec: QuantSpec) -> None:
    solved = solver(torch.zeros(ROWS, COLUMNS), layer()[1], spec)
    assert not outliers_of(solved)
    assert not solved.dequantize().any()


@requests
@pytest.mark.parametrize("factor", [2e-29, 2e-5, 2e-3])
def test_small_weights(solver: SpQR, spec: QuantSpec, factor: float) -> None:
    # Steps of scales of weights below 1e-5 are among the coarsest numbers of float16.
    weight, hessian = layer()
    solved = solver(weight * factor, hessian, spec)
    assert (solved.dequantize() - weight * factor).abs().max() <= (weight * factor).abs().max()
    if factor > 1e-9:
        usual = solver(weight, hessian, spec)
        error = relative_error(solved, weight * factor, hessian)
        assert error <= 2 * relative_error(usual, weight, hessian) + 1e-4


@requests
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_constant_row_does_not_spoil_its_neighbours(
    solver: SpQR, spec: QuantSpec, value: float
) -> None:
    weight, hessian = layer()
    usual = solver(weight, hessian, spec).dequantize() - weight
    weight[3] = value
    solved = solver(weight, hessian, spec)
    found = solved.dequantize() - weight
    others = torch.arange(ROWS) != 3
    assert hessian.error_energy(found[others]) <= 2 * hessian.error_energy(usual[others])
    assert len(outliers_of(solved)) <= 0.03 * weight.numel()


def test_groups_of_one_scale() -> None:
    # Ternary weights: every group has the same scale and the same zero point, which the published
    # code stores with a relative error of 1.
    weight = torch.tensor([-1.0, 0.0, 1.0]).repeat(ROWS, 16) * 0.0057
    independent = observed(torch.eye(COLUMNS))
    for solver in (FAITHFUL, replace(FAITHFUL, threshold=math.inf)):
        solved = solver(weight, independent, replace(FAITHFUL_SPEC, bits=2))
        # Three equal steps fall between four codes: half a step is what float zeros can lose.
        assert (solved.dequantize() - weight).abs().max() <= 0.0019 * 1.001
        scales = solved.grid.scales()
        assert scales == pytest.approx(torch.full_like(scales, 0.0114 / 3), rel=2.0**-11)
    ternary = SpQR(threshold=math.inf, clip="minmax")(
        weight, independent, QuantSpec(2, 16, True, scale_bits=3)
    )
    assert (ternary.dequantize() - weight).abs().max() <= 0.0057 * 2.0**-11


def test_one_output_row_keeps_as_few_outliers_as_many_rows() -> None:
    weight, hessian = layer(1)
    for solver, spec in (
        (FAITHFUL, FAITHFUL_SPEC),
        (SpQR(threshold=0.2), SECOND_LEVEL),
        (SpQR(outliers=0.05), QuantSpec(3, 16)),
    ):
        solved = solver(weight, hessian, spec)
        assert len(outliers_of(solved)) <= 0.1 * COLUMNS
        assert relative_error(solved, weight, hessian) < 0.01


def test_one_output_row_still_chooses_ranges_by_loss() -> None:
    weight, hessian = layer(1)
    weight[0, 3] = 1.0
    spec = QuantSpec(3, 16)
    clipped = SpQR(threshold=math.inf, groups="static")(weight, hessian, spec).grid.scales()
    covered = SpQR(threshold=math.inf, groups="static", clip="minmax")(
        weight, hessian, spec
    ).grid.scales()
    assert bool((clipped < covered).any())


@pytest.mark.parametrize("groups", ["static", "aligned", "refit"])
def test_a_row_of_outliers_is_kept_and_nothing_else(groups: Any) -> None:
    weight, hessian = layer()
    weight[2] *= 400
    solver = SpQR(threshold=0.0005, groups=groups, detect="simple")
    solved = solver(weight, hessian, QuantSpec(3, 16))
    rows = [row for row, _ in outliers_of(solved)]
    assert set(rows) == {2}
    assert len(rows) > 0.8 * weight.shape[1]
    plain = replace(solver, threshold=math.inf)(weight, hessian, QuantSpec(3, 16))
    assert relative_error(solved, weight, hessian) < 0.1 * relative_error(plain, weight, hessian)


@pytest.mark.parametrize("groups", ["static", "aligned", "refit"])
def test_a_matrix_of_only_outliers_is_refused(groups: Any) -> None:
    # A price of next to nothing: whatever is not on the grid by chance would be kept.
    weight, hessian = layer()
    with pytest.raises(SolverError, match=r"would be outliers, .* raise the threshold"):
        SpQR(threshold=1e-12, groups=groups)(weight, hessian, QuantSpec(3, 16))


@requests
@pytest.mark.parametrize("group_size", [1, 48, -1])
def test_groups_of_one_input_and_of_all(solver: SpQR, spec: QuantSpec, group_size: int) -> None:
    weight, hessian = layer()
    solved = solver(weight, hessian, replace(spec, group_size=group_size))
    groups = 48 if group_size == 1 else 1
    assert solved.grid.scales().shape == (ROWS, groups)
    nearest = RTN()(weight, None, QuantSpec(spec.bits, 48))
    assert relative_error(solved, weight, hessian) < relative_error(nearest, weight, hessian)


@pytest.mark.parametrize("rows", [1, 16, 100, 128, 200, 1000, 5000])
def test_the_sample_is_spread_over_all_rows(rows: int) -> None:
    picked = sampled_rows(rows, 1).tolist()
    assert picked == sorted(set(picked))
    assert min(rows, SAMPLED_ROWS) <= len(picked) <= 2 * SAMPLED_ROWS
    step = rows / len(picked)
    assert picked[0] < step + 1
    assert rows - picked[-1] <= step + 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": 0.0}, "threshold must be positive, or inf for none, not 0.0"),
        ({"threshold": -1.0}, "threshold must be positive, or inf for none, not -1.0"),
        ({"threshold": math.nan}, "threshold must be positive, or inf for none, not nan"),
        ({"outliers": -0.1}, "outliers must be a share from 0 to 0.5, not -0.1"),
        ({"outliers": 0.6}, "outliers must be a share from 0 to 0.5, not 0.6"),
        ({"outliers": math.nan}, "outliers must be a share from 0 to 0.5, not nan"),
        (
            {"detect": "guess"},
            "detect must be one of leave-one-out, simple, not 'guess'",
        ),
        ({"clip": "none"}, "clip must be one of minmax, mse, hessian, not 'none'"),
        ({"groups": "own"}, "groups must be one of static, aligned, refit, not 'own'"),
        ({"damp": 0.0}, "damp must be above 0 and at most 1, not 0.0"),
        ({"block_size": 0}, "block_size must be positive, not 0"),
    ],
)
def test_parameters_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as refused:
        SpQR(**fields)
    assert str(refused.value) == message
