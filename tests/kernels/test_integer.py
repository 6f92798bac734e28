"""Products in integers: every instruction set against the PyTorch reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from extension import native
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from quantine.activations.grids import StaticGrid, TokenGrid
from quantine.core.arithmetic import ARITHMETICS
from quantine.core.grid import Grid, Statistic, encode
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.core.spec import CLUSTERS
from quantine.kernels import backend
from quantine.kernels.integer import (
    cpu,
    input_codes,
    levels,
    multiplies_integers,
    multiply,
    native_grid,
)
from quantine.kernels.integer.cpu import SCALAR
from quantine.kernels.integer.input_grid import InputGrid
from quantine.kernels.integer.reference import multiply_reference
from quantine.kernels.integer.token_factors import factors, steepness
from quantine.kernels.matrix import multiply as multiply_floats
from quantine.kernels.matrix import multiply_panels, packed_matrix
from quantine.kernels.matrix.reference import multiply_reference as floats_reference
from quantine.kernels.threads import pool
from samples import generator, quick

ZEROS = ("middle", "whole", "half", "coded")
LEVELS = ("amx", "avx512", "i8mm", "dotprod", "neon", "scalar")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    assert backend.native() is not None, "the native extension is off or missing"
    if request.param not in levels():
        pytest.skip(f"this processor has no {request.param}")
    found: str = request.param
    return found


def qtensor_of(
    seed: int,
    rows: int,
    sizes: Sequence[int],
    bits: int,
    zero: str = "whole",
    outliers: float = 0.0,
    ordered: bool = False,
) -> QTensor:
    """Random codes and statistics; groups of ``sizes``."""
    g, groups, columns = generator(seed), len(sizes), sum(sizes)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=g, dtype=torch.uint8)
    points: Tensor | Statistic | None = None
    if zero == "whole":
        points = torch.randint(0, 2**bits, (rows, groups), generator=g, dtype=torch.uint8)
    elif zero == "half":
        points = (torch.randn(rows, groups, generator=g) * 2**bits).half()
    elif zero == "coded":
        spans = math.ceil(rows / 16)
        steps = (torch.rand(groups, spans, generator=g) * 0.5).half()
        second = Grid(steps, torch.randn(groups, spans, generator=g).half(), 4, 16)
        points = Statistic(torch.randint(0, 16, (groups, rows), generator=g).byte(), second)
    kept = None
    if outliers:
        mask = torch.rand(rows, columns, generator=g) < outliers
        mask[-1, 0] = True
        mask[rows // 2] = False  # an empty row among others
        mask[0] = True  # and a full one
        kept = Csr.where(mask, torch.randn(rows, columns, generator=g))
    order = torch.randperm(columns, generator=g) if ordered else None
    scale = (torch.rand(rows, groups, generator=g) * 0.05 + 1e-4).half()
    grid = Grid(scale, points, bits, CLUSTERS, sizes=tuple(sizes))
    return QTensor(codes, grid, order, kept)


def grid_of(seed: int, kind: str, groups: int, bits: int) -> InputGrid:
    """Grids of activations near a standard normal distribution."""
    if kind == "token":
        return InputGrid(bits)
    g = generator(seed + 1)
    scale = (torch.rand(groups, generator=g) + 0.1) * 6 / 2**bits
    beyond = {"inside": 1.0, "beyond": 40.0, "factors": 1.0}[kind]
    zero = (torch.rand(groups, generator=g) * (2**bits - 1) * beyond).round()
    return InputGrid(bits, scale, zero, torch.tensor([0.85]) if kind == "factors" else None)


def inputs(batch: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, columns, generator=generator(seed))


def reach(q: QTensor, grid: InputGrid, x: Tensor) -> Tensor:
    """How large the sums are before zero points are taken off, ``[batch, out]`` float64."""
    lengths = q.grid.lengths(x.shape[1])
    stored = x if q.in_perm is None else x[:, q.in_perm]
    scale, zero = grid.of_inputs(stored, lengths)
    factor = factor_of(grid, stored, scale, zero).double()
    scale, zero = scale.double() * factor, zero.double()
    spread = torch.tensor(lengths)
    zeros = q.grid.zeros().double().repeat_interleave(spread, 1)
    weights = (q.codes + zeros.abs()) * q.grid.scales().double().repeat_interleave(spread, 1)
    if q.outliers is not None:
        places = q.outliers.row_indices(), q.outliers.columns
        weights[places] += q.outliers.values.double().abs()
    return (2**grid.bits + zero.abs()) * scale @ weights.T


def factor_of(grid: InputGrid, stored: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The factor of each row, ``[batch, 1]``; ones where there are none."""
    if grid.reach is None:
        return torch.ones(len(stored), 1)
    return factors(stored, *steepness(scale, zero, grid.bits, grid.reach))


def close(found: Tensor, q: QTensor, grid: InputGrid, x: Tensor) -> bool:
    expected = multiply_reference(q, grid, x)
    return bool(((found - expected).abs() <= 2e-6 * reach(q, grid, x) + 1e-30).all())


sizes = st.lists(
    st.one_of(st.integers(1, 9), st.integers(1, 70), st.sampled_from([16, 64, 65, 128, 200])),
    min_size=1,
    max_size=6,
)
cases = st.builds(
    qtensor_of,
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 70),
    sizes=sizes,
    bits=st.integers(2, 8),
    zero=st.sampled_from(ZEROS),
    outliers=st.sampled_from([0.0, 0.0, 0.02, 0.3]),
    ordered=st.booleans(),
)
kinds = st.sampled_from(["inside", "beyond", "token", "factors"])
batches = st.one_of(st.integers(1, 50), st.sampled_from([96, 97, 130]))


@quick
@given(q=cases, kind=kinds, bits=st.integers(2, 8), batch=batches)
@example(q=qtensor_of(0, 40, [1] * 30, 4), kind="inside", bits=8, batch=33)
@example(q=qtensor_of(1, 33, [64, 3, 200], 8, "half", 0.02, True), kind="inside", bits=8, batch=17)
@example(q=qtensor_of(1, 33, [64, 3, 20], 4, "whole", 0.02, True), kind="factors", bits=8, batch=40)
def test_every_level_is_the_reference_and_finds_the_same_bits(
    q: QTensor, kind: str, bits: int, batch: int
) -> None:
    grid, x = grid_of(batch, kind, len(q.grid.sizes), bits), inputs(batch, q.codes.shape[1])
    matrix, native = packed_matrix(q), native_grid(grid)
    found = [multiply(matrix, native, x, level) for level in levels()]
    assert close(found[0], q, grid, x)
    assert all(torch.equal(found[0], other) for other in found[1:])


@quick
@given(q=cases, bits=st.integers(2, 8), batch=st.integers(1, 20), spread=st.floats(-6, 6))
def test_codes_are_those_of_the_grids(q: QTensor, bits: int, batch: int, spread: float) -> None:
    lengths = torch.tensor(q.grid.sizes)
    grid = grid_of(batch, "inside", len(lengths), bits)
    assert grid.scale is not None
    assert grid.zero is not None
    x = inputs(batch, q.codes.shape[1]) * 10**spread
    x[:, ::3] = (x[:, ::3] / grid.scale[0]).round() * grid.scale[0] * 1.5  # ties
    stored = x if q.in_perm is None else x[:, q.in_perm]
    labels = torch.arange(len(lengths)).repeat_interleave(lengths).int()
    step = StaticGrid(bits, grid.scale, grid.zero, labels)
    expected = encode(stored.float(), *step.of_channels(), bits).byte()
    assert torch.equal(input_codes(packed_matrix(q), native_grid(grid), x), expected)


@quick
@given(q=cases, bits=st.integers(2, 8), batch=st.integers(1, 20), spread=st.floats(-6, 6))
def test_codes_of_rows_with_factors(q: QTensor, bits: int, batch: int, spread: float) -> None:
    lengths = torch.tensor(q.grid.sizes)
    grid = grid_of(batch, "factors", len(lengths), bits)
    x = inputs(batch, q.codes.shape[1]) * 10**spread
    x[0] = 0
    stored = x if q.in_perm is None else x[:, q.in_perm]
    scale, zero = grid.of_inputs(stored, q.grid.sizes)
    ordered = stored / factor_of(grid, stored, scale, zero)
    expected = torch.clamp((ordered / scale + zero).round(), 0, 2**bits - 1).byte()
    assert torch.equal(input_codes(packed_matrix(q), native_grid(grid), x), expected)


@quick
@given(q=cases, bits=st.integers(2, 8), batch=st.integers(1, 20), spread=st.floats(-6, 6))
def test_grids_of_tokens(q: QTensor, bits: int, batch: int, spread: float) -> None:
    x = inputs(batch, q.codes.shape[1]) * 10**spread + spread
    grid, module = InputGrid(bits), TokenGrid(bits)
    codes = input_codes(packed_matrix(q), native_grid(grid), x)
    stored = x if q.in_perm is None else x[:, q.in_perm]
    scale, zero = grid.of_inputs(x, q.grid.sizes)
    assert torch.equal((codes - zero).mul(scale), module(stored))


@quick
@given(q=cases, kind=kinds, bits=st.integers(2, 8))
def test_the_float_simulation_agrees(q: QTensor, kind: str, bits: int) -> None:
    grid, x = grid_of(3, kind, len(q.grid.sizes), bits), inputs(9, q.codes.shape[1])
    stored = x if q.in_perm is None else x[:, q.in_perm]
    scale, zero = grid.of_inputs(stored, q.grid.sizes)
    factor = factor_of(grid, stored, scale, zero)
    codes = torch.clamp((stored / factor / scale + zero).round(), 0, 2**bits - 1)
    rounded = (codes.double() - zero) * scale * factor
    weight = q.dequantize().double()
    weight = weight if q.in_perm is None else weight[:, q.in_perm]
    found = multiply(packed_matrix(q), native_grid(grid), x)
    bound = 2e-6 * reach(q, grid, x)
    assert bool(((found - rounded @ weight.T).abs() <= bound + 1e-30).all())


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_the_largest_sums_are_exact(level: str, bits: int) -> None:
    columns = 65_000
    assert columns <= native().LONGEST_GROUP
    for code in (0, 2**bits - 1):
        for zero in (0, 2**bits - 1):
            codes = torch.full((3, columns), code, dtype=torch.uint8)
            points = torch.full((3, 1), zero, dtype=torch.uint8)
            weights = Grid(torch.ones(3, 1).half(), points, bits, columns)
            q = QTensor(codes, weights)
            grid = InputGrid(8, torch.ones(1), torch.zeros(1))
            x = torch.full((33, columns), 255.0)
            found = multiply(packed_matrix(q), native_grid(grid), x, level)
            assert torch.equal(found, torch.full((33, 3), (code - zero) * 255.0 * columns))


def test_groups_whose_sums_could_overflow_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = int(native().LONGEST_GROUP)
    monkeypatch.setattr(cpu, "levels", lambda: ["faster", SCALAR])  # on every processor
    assert 128 * 255 * longest < 2**31
    for length, taken in ((longest, True), (longest + 1, False)):
        codes = torch.zeros(1, length, dtype=torch.uint8)
        q = QTensor(codes, Grid(torch.ones(1, 1).half(), None, 4, length))
        assert multiplies_integers(q) == taken
    out = qtensor_of(0, 16, [16], 4)
    turned = QTensor(out.codes, Grid(torch.ones(16, 1).half(), None, 4, 16, "out"))
    assert not multiplies_integers(turned)


def test_floats_are_faster_than_integers_without_instructions_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q = qtensor_of(0, 16, [16], 4)
    for found, taken in ((["faster", SCALAR], True), ([SCALAR], False)):
        monkeypatch.setattr(cpu, "levels", lambda found=found: found)
        assert multiplies_integers(q) == taken


def test_what_is_not_finite(level: str) -> None:
    q = qtensor_of(1, 20, [7, 64, 3], 4)
    grid = grid_of(1, "inside", 3, 8)
    matrix, x = packed_matrix(q), inputs(5, 74)
    x[1, 20], x[3, 4] = math.inf, -math.inf  # codes at the ends
    assert close(multiply(matrix, native_grid(grid), x, level), q, grid, x)
    x[2, 70] = math.nan
    for found in (
        multiply(matrix, native_grid(grid), x, level),
        multiply(matrix, native_grid(InputGrid(8)), x, level),
    ):
        assert bool(found[2].isnan().all())
        assert bool(found[[0, 4]].isfinite().all())
    scaled = multiply(matrix, native_grid(grid_of(1, "factors", 3, 8)), x, level)
    assert bool(scaled[2].isnan().all())
    assert bool(scaled[[0, 1, 3, 4]].isfinite().all())
    own = multiply(matrix, native_grid(InputGrid(8)), x, level)
    assert bool(own[[1, 3]].isnan().all())  # as TokenGrid has it
    assert bool(TokenGrid(8)(x)[[1, 3]].isnan().all())
    assert bool(multiply(matrix, native_grid(InputGrid(8)), torch.zeros(2, 74), level).eq(0).all())


@pytest.mark.parametrize("batch", [1, 100])
def test_threads_do_not_change_a_bit(level: str, batch: int) -> None:
    q = qtensor_of(0, 500, [100, 7, 64, 200], 4, "half", 0.02, True)
    x, grid, matrix = inputs(batch, 371), native_grid(grid_of(0, "inside", 4, 8)), packed_matrix(q)
    native: Any = backend.native()
    results = []
    for count in (1, 2, 5):
        results.append(torch.empty(batch, 500))
        native.multiply_integer(matrix, grid, x, results[-1], level, native.Pool(count))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_grids_of_channels_that_groups_cross_are_not_taken() -> None:
    q = qtensor_of(0, 5, [4, 6], 4, ordered=True)
    assert q.in_perm is not None
    labels = torch.empty(10, dtype=torch.int64)
    labels[q.in_perm] = torch.tensor([0] * 4 + [1] * 6)
    scale, zero = torch.tensor([0.5, 2.0]), torch.tensor([3.0, 9.0])
    found = InputGrid.of_channels(8, scale[labels], zero[labels], q)
    assert found is not None
    assert found.scale is not None
    assert torch.equal(found.scale, scale)
    labels[q.in_perm[0]] = 1
    assert InputGrid.of_channels(8, scale[labels], zero[labels], q) is None


@quick
@given(q=cases, batch=st.sampled_from([1, 3, 9]))
def test_float_activations_meet_groups_of_any_size(q: QTensor, batch: int) -> None:
    x, matrix = inputs(batch, q.codes.shape[1]), packed_matrix(q)
    for arithmetic in ARITHMETICS:
        (found,) = multiply_floats([matrix], x, arithmetic)
        expected = floats_reference(q, x, arithmetic)
        spread = torch.tensor(q.grid.sizes)
        weights = (q.codes + q.grid.zeros().abs().repeat_interleave(spread, 1)) * (
            q.grid.scales().repeat_interleave(spread, 1)
        )
        if q.outliers is not None:
            places = q.outliers.row_indices(), q.outliers.columns
            weights[places] += q.outliers.values.float().abs()
        stored = x if q.in_perm is None else x[:, q.in_perm]
        bound = 1e-5 * stored.abs() @ weights.T + 1e-30
        assert bool(((found - expected).abs() <= bound).all())
    out = torch.empty(q.codes.shape)
    matrix.decode(0, out, pool())
    torch.testing.assert_close(out, q.dequantize(), atol=1e-4, rtol=1e-4)
    panels = multiply_panels(matrix, x, "exact")
    torch.testing.assert_close(panels, x @ out.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(2, 11)},
        {"y": torch.zeros(2, 6)},
        {"y": torch.zeros(1, 5)},
        {"level": "mmx"},
        {"scale": torch.ones(3), "zero": torch.ones(3)},
        {"zero": torch.ones(1)},
        {"bits": 9},
        {"above": torch.ones(2)},
        {"above": torch.ones(3), "below": torch.ones(3)},
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any]) -> None:
    native: Any = backend.native()
    fields: dict[str, Any] = {
        "bits": 8,
        "scale": torch.ones(2),
        "zero": torch.ones(2),
        "x": torch.zeros(2, 10),
        "y": torch.zeros(2, 5),
        "level": "scalar",
        "above": None,
        "below": None,
    }
    matrix = packed_matrix(qtensor_of(0, 5, [4, 6], 4))

    def product(bits: int, x: Tensor, y: Tensor, level: str, **of_grid: Tensor | None) -> None:
        grid = native.InputGrid(bits, **of_grid)
        native.multiply_integer(matrix, grid, x, y, level, native.Pool(1))

    product(**fields)
    with pytest.raises(ValueError, match=r"x must|y must|level|inputs|scales|factors"):
        product(**{**fields, **change})


def test_sizes_of_groups_sum_to_the_columns() -> None:
    q = qtensor_of(0, 5, [4, 6], 4)
    for wrong in ((4, 5), (4, 7), (4, 6, 0)):
        scale = torch.ones(5, len(wrong)).half()
        with pytest.raises(ValueError, match="sizes"):
            packed_matrix(QTensor(q.codes, Grid(scale, None, 4, CLUSTERS, sizes=wrong)))
