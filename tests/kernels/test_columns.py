"""The native column loop against the PyTorch code that defines it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantine.core.grid import Grid, decode, encode
from quantine.core.spec import QuantSpec
from quantine.kernels import backend
from quantine.kernels.columns import round_block
from quantine.kernels.columns.columns import AtReach, Columns
from quantine.kernels.columns.reference import round_block_reference
from quantine.kernels.fit.fitted import FittedGroups
from quantine.kernels.fit.grid_cost import Clip, GridCost, positive
from quantine.statistics.inverse_factor import InverseFactor
from samples import generator, quick, threads

LARGEST_SHARE_DIFFERING = 0.002
"""Float32 sums in another order may tip a tie."""

CPU = torch.device("cpu")


def columns_of(weight: Tensor, factor: InverseFactor, *rest: Any) -> Columns:
    """`Columns.of` with what a factor holds."""
    return Columns.of(weight, factor.upper, factor.order, *rest)


def factor(inputs: int, seed: int) -> InverseFactor:
    upper = torch.randn(inputs, inputs, generator=generator(seed)).triu(1) * 0.1 + torch.eye(inputs)
    return InverseFactor(upper, torch.arange(inputs), 0.01)


def grids(count: int, rows: int, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points ``[count, rows]``: whole ones, fractions, far ones; a scale of 0."""
    scale = torch.rand(count, rows, generator=generator(seed)) * 0.05 + 0.002
    scale[0, -1] = 0.0
    zero = torch.randint(0, 2**bits, (count, rows), generator=generator(seed + 1)).float()
    zero[:, ::3] += torch.rand(count, len(zero[0, ::3]), generator=generator(seed + 2)) * 9 - 4
    return scale, zero


def copied(columns: Columns) -> Columns:
    return replace(
        columns,
        weights=columns.weights.clone(),
        codes=columns.codes.clone(),
        errors=columns.errors.clone(),
        kept=None if columns.kept is None else columns.kept.clone(),
    )


def share_differing(one: Columns, other: Columns, stop: int) -> Tensor:
    """The share of rows that differ; what feedback makes of a tie that tips moves a whole row."""
    same = (one.codes[:stop] == other.codes[:stop]).all(0)
    same &= torch.isclose(one.weights, other.weights, atol=1e-5).all(0)
    same &= torch.isclose(one.errors[:stop], other.errors[:stop], atol=1e-5, rtol=1e-4).all(0)
    if one.kept is not None and other.kept is not None:
        same &= (one.kept[:stop] == other.kept[:stop]).all(0)
    return 1.0 - same.float().mean()


@quick
@given(
    n=st.integers(1, 50),
    rows=st.sampled_from([1, 3, 16, 63, 64, 65, 255, 256, 257, 600]),
    bits=st.integers(2, 8),
    price=st.sampled_from([math.inf, 0.02, 1e-4]),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_known_grids_round_alike(
    n: int, rows: int, bits: int, price: float, seed: int, data: st.DataObject
) -> None:
    weight = torch.randn(rows, n, generator=generator(seed)) * 0.1
    groups = torch.randint(0, 3, (n,), generator=generator(seed))
    values = grids(3, rows, bits, seed)
    native = columns_of(weight, factor(n, seed), bits, values, groups, price)
    reference = copied(native)
    cut, stop = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    for block in ((0, cut), (cut, stop)):
        round_block(native, *block)
        round_block_reference(reference, *block)
    assert torch.equal(native.weights[stop:], weight.T[stop:]) or stop > 0
    assert share_differing(native, reference, stop) <= max(LARGEST_SHARE_DIFFERING, 1.5 / rows)


def coupled(rows: int, run: int, seed: int) -> Tensor:
    """What rows ask of each other; what is beside the triangle that counts is not a number."""
    coupling = torch.randn(rows, run, generator=generator(seed)) * 0.3
    places = torch.arange(rows).unsqueeze(1) % run
    return coupling.masked_fill_(torch.arange(run) >= places, math.nan)


def check_coupled(found: Columns, weight: Tensor) -> None:
    """Check coupled rows that were rounded in one block by what the result itself says of them.

    No other rounding is compared: where a tie tips, all rows of a run before it may differ.

    Args:
        found: the columns, rounded.
        weight: ``[rows, inputs]``, before.
    """
    assert found.coupling is not None
    rows, run = found.coupling.shape
    places = torch.arange(rows) % run
    counts = torch.arange(run) < places.unsqueeze(1)
    coupling = found.coupling.masked_fill(~counts, 0.0).double()
    starts = torch.arange(rows) - places
    for j, wanted in enumerate(found.weights):
        grid = found.groups[j]
        scale, zero = positive(found.scales[grid]), found.zeros[grid]
        value, half = decode(found.codes[j], scale, zero), wanted.half().float()
        plain = (wanted - value) / found.upper[j, j]
        if found.kept is not None:
            lost = (wanted - half) / found.upper[j, j]
            kept = (plain.square() > found.price) & (lost.abs() < plain.abs())
            unclear = torch.isclose(plain.square(), torch.tensor(found.price), rtol=1e-3)
            assert torch.equal(found.kept[j] | unclear, kept | unclear)
            value = torch.where(found.kept[j], half, value)
        nearest = encode(wanted, scale, zero, found.bits)
        assert float((found.codes[j] - nearest).abs().max()) <= 1  # a tie
        assert float((found.codes[j] != nearest).float().mean()) <= max(0.01, 1 / rows)
        before = weight[:, j] - found.upper[:j, j] @ found.errors[:j]
        lost = (before - value).double()
        asks = coupling * lost.unsqueeze(1)
        asked = torch.zeros(rows + run, dtype=torch.float64)
        asked.index_add_(0, (starts.unsqueeze(1) + torch.arange(run)).flatten(), asks.flatten())
        near = {"atol": 1e-5 * float(asks.abs().max() + 1), "rtol": 1e-4}
        torch.testing.assert_close(wanted.double(), before + asked[:rows], **near)
        torch.testing.assert_close(found.errors[j] * found.upper[j, j], lost.float(), **near)


@quick
@given(
    n=st.integers(1, 30),
    rows=st.sampled_from([1, 3, 16, 65, 130, 257, 300]),
    run=st.sampled_from([1, 2, 7, 64, 100, 256, 400]),
    bits=st.integers(2, 8),
    price=st.sampled_from([math.inf, 0.02, 1e-4]),
    seed=st.integers(0, 10**6),
    of=st.sampled_from([round_block, round_block_reference]),
)
def test_coupled_rows_make_up_for_each_other(
    n: int, rows: int, run: int, bits: int, price: float, seed: int, of: Any
) -> None:
    weight = torch.randn(rows, n, generator=generator(seed)) * 0.1
    groups = torch.randint(0, 3, (n,), generator=generator(seed))
    columns = replace(
        columns_of(weight, factor(n, seed), bits, grids(3, rows, bits, seed), groups, price),
        coupling=coupled(rows, run, seed),
    )
    of(columns, 0, n)
    check_coupled(columns, weight)


@quick
@given(
    groups=st.integers(1, 4),
    length=st.sampled_from([1, 2, 5, 16, 40]),
    rows=st.sampled_from([1, 3, 64, 130]),
    scale_bits=st.sampled_from([16, 3]),
    price=st.sampled_from([math.inf, 0.01]),
    seed=st.integers(0, 10**6),
)
def test_groups_are_fitted_when_they_are_reached(
    groups: int, length: int, rows: int, scale_bits: int, price: float, seed: int
) -> None:
    inputs = groups * length
    weight = torch.randn(rows, inputs, generator=generator(seed)) * 0.1
    spec = QuantSpec(3, length, scale_bits=scale_bits)
    found = factor(inputs, seed)

    def started() -> tuple[Columns, FittedGroups]:
        fitted = FittedGroups.empty(groups, rows, length, spec, CPU)
        at_reach = AtReach(fitted, found.upper.diagonal().clone(), GridCost("hessian", price, True))
        values = fitted.scale.values, fitted.zero.values
        number = torch.arange(inputs) // length
        return columns_of(weight, found, 3, values, number, price, at_reach), fitted

    (native, fitted), (reference, expected) = started(), started()
    half = groups // 2 * length
    for block in ((0, half), (half, inputs)):
        round_block(native, *block)
        round_block_reference(reference, *block)
    # A tie between two grids is likelier than one between two codes.
    allowed = 0.03 if rows > 50 else 1.0
    assert share_differing(native, reference, inputs) <= allowed
    differing = fitted.grid().scales() != expected.grid().scales()
    assert differing.float().mean() <= allowed
    torch.testing.assert_close(
        native.errors.square().sum(), reference.errors.square().sum(), rtol=0.05, atol=1e-6
    )


@quick
@given(
    inputs=st.integers(1, 40),
    groups=st.sampled_from([1, 3, 16, 40]),
    length=st.sampled_from([1, 2, 5, 64]),
    scale_bits=st.sampled_from([16, 3]),
    zero_bits=st.sampled_from([0, 4, 16]),
    clip=st.sampled_from(["minmax", "mse", "hessian"]),
    price=st.sampled_from([math.inf, 0.01]),
    seed=st.integers(0, 10**6),
)
def test_groups_of_outputs_are_fitted_when_their_column_is_reached(
    inputs: int,
    groups: int,
    length: int,
    scale_bits: int,
    zero_bits: int,
    clip: Clip,
    price: float,
    seed: int,
) -> None:
    rows = groups * length
    weight = torch.randn(rows, inputs, generator=generator(seed)) * 0.1
    spec = QuantSpec(3, length, scale_bits=scale_bits, zero_bits=zero_bits, group_axis="out")
    found = factor(inputs, seed)
    second = tuple(
        Grid(torch.full((inputs, groups), step), torch.full((inputs, groups), -1.0), bits, 1)
        if bits in {3, 4}
        else None
        for bits, step in ((scale_bits, 0.008), (zero_bits, 0.4))
    )

    def started() -> tuple[Columns, FittedGroups]:
        fitted = FittedGroups.of_columns(inputs, rows, spec, (second[0], second[1]), CPU)
        at_reach = AtReach(fitted, found.upper.diagonal().clone(), GridCost(clip, price, True))
        room = torch.empty(1, rows), torch.empty(1, rows)
        number = torch.zeros(inputs, dtype=torch.int64)
        return columns_of(weight, found, 3, room, number, price, at_reach), fitted

    (native, fitted), (reference, expected) = started(), started()
    for block in ((0, inputs // 2), (inputs // 2, inputs)):
        round_block(native, *block)
        round_block_reference(reference, *block)
    allowed = 0.03 if groups > 10 else 1.0
    assert share_differing(native, reference, inputs) <= 2 * allowed
    for one, other in ((fitted.scale, expected.scale), (fitted.zero, expected.zero)):
        assert (one.values != other.values).float().mean() <= allowed
        assert torch.equal(one.step, other.step) or None in second
    torch.testing.assert_close(
        native.errors.square().sum(), reference.errors.square().sum(), rtol=0.05, atol=1e-6
    )


@quick
@given(
    rows=st.sampled_from([1, 31, 64, 257, 600, 1100]),
    length=st.sampled_from([4, 16]),
    scale_bits=st.sampled_from([16, 3]),
    run=st.sampled_from([-1, 7, 16, 64]),
    seed=st.integers(0, 10**6),
)
def test_any_number_of_threads_finds_the_same_bits(
    rows: int, length: int, scale_bits: int, run: int, seed: int
) -> None:
    inputs = 48
    weight = torch.randn(rows, inputs, generator=generator(seed)) * 0.1
    spec = QuantSpec(3, length, scale_bits=scale_bits, stat_group_size=run)
    upper = factor(inputs, seed)
    found = []
    for count in (1, 2, 3, 5):
        fitted = FittedGroups.empty(inputs // length, rows, length, spec, CPU)
        at_reach = AtReach(fitted, upper.upper.diagonal().clone(), GridCost("hessian", 0.01, True))
        values = fitted.scale.values, fitted.zero.values
        columns = columns_of(
            weight, upper, 3, values, torch.arange(inputs) // length, 0.01, at_reach
        )
        with threads(count):
            round_block(columns, 0, inputs)
        grid = fitted.grid()
        assert columns.kept is not None
        found.append([columns.codes, columns.errors, columns.weights, columns.kept, grid.scales()])
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


def test_kept_weights_lose_what_float16_loses() -> None:
    exponents = torch.randint(-10, 6, (4000,), generator=generator(0))
    values = torch.randn(4000, generator=generator(1)) * 10.0**exponents
    edges = [65504.0, 65519.9, 65520.0, 1e6, 6e-8, 2.9e-8, 3.1e-8, 2.0**-14, 0.0, -0.0]
    values = torch.cat([values, torch.tensor(edges)])
    grid = torch.ones(1, len(values)), torch.zeros(1, len(values))
    one = InverseFactor(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), 0.01)
    columns = columns_of(values.view(-1, 1), one, 2, grid, one.order, 1e-30)
    round_block(columns, 0, 1)
    assert columns.kept is not None
    kept, errors = columns.kept[0], columns.errors[0]
    half = values.half().float()
    assert torch.equal(errors[kept], (values - half)[kept])
    # What float16 cannot hold stays a code, however much that loses, and what it makes zero.
    assert not bool(kept[~half.isfinite()].any())
    assert not bool(kept[half == 0].any())
    far = half.isfinite() & ((values < -1e-7) | (values > 3.5))
    assert bool(kept[far].all())


def test_shapes_that_do_not_fit_are_refused() -> None:
    columns = columns_of(
        torch.zeros(5, 3), factor(3, 0), 3, grids(2, 5, 3, 0), torch.tensor([0, 0, 1]), math.inf
    )
    round_block(columns, 0, 3)
    with pytest.raises(ValueError, match=r"upper must be \[inputs, inputs\]"):
        round_block(replace(columns, upper=torch.eye(2)), 0, 3)
    with pytest.raises(ValueError, match="everything else"):
        round_block(columns, 0, 4)
    with pytest.raises(ValueError, match="groups must be rows of scales"):
        round_block(replace(columns, groups=torch.tensor([0, 1, 2])), 0, 3)
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        round_block(replace(columns, bits=9), 0, 3)
    for shape in ((4, 2), (5, 0)):
        with pytest.raises(ValueError, match=r"coupling must be \[rows, run\]"):
            round_block(replace(columns, coupling=torch.zeros(shape)), 0, 3)
    assert backend.native() is not None
