"""The native loops of the solvers against the PyTorch code that defines them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.columns import (
    cheapest_grids,
    cheapest_grids_reference,
    round_columns,
    round_columns_reference,
    rounding_errors,
)
from samples import quick

LARGEST_SHARE_DIFFERING = 0.002
"""Float32 sums in another order may tip a tie."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grids(count: int, rows: int, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points ``[count, rows]``: whole ones, fractions, and far ones."""
    scale = torch.rand(count, rows, generator=generator(seed)) * 0.05 + 0.002
    zero = torch.randint(0, 2**bits, (count, rows), generator=generator(seed + 1)).float()
    zero[:, ::3] += torch.rand(count, len(zero[0, ::3]), generator=generator(seed + 2)) * 9 - 4
    return scale, zero


def costs(
    columns: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, bits: int, price: float
) -> Tensor:
    """The cost of every candidate, ``[candidates, groups, rows]``, in float64."""
    found = []
    for scale, zero in zip(scales, zeros, strict=True):
        squares = rounding_errors(columns, scale, zero, bits).double().square()
        found.append((squares * importance.unsqueeze(-1)).clamp(max=price).sum(1))
    return torch.stack(found)


@quick
@given(
    n=st.integers(1, 40),
    rows=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 200]),
    candidates=st.integers(1, 21),
    bits=st.integers(2, 8),
    price=st.sampled_from([math.inf, 0.01, 1e-6]),
    transposed=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_the_cheapest_grid_is_found(
    n: int, rows: int, candidates: int, bits: int, price: float, transposed: bool, seed: int
) -> None:
    columns = torch.randn(2, n, rows, generator=generator(seed)) * 0.1
    if transposed:  # as a view of a matrix whose columns are not contiguous
        columns = columns.transpose(1, 2).contiguous().transpose(1, 2)
    importance = torch.rand(2, n, generator=generator(seed)) * 100
    scale, zero = grids(candidates * 2, rows, bits, seed)
    scales, zeros = scale.view(candidates, 2, rows), zero.view(candidates, 2, rows)
    best = cheapest_grids(columns, importance, scales, zeros, bits, price)
    reference = cheapest_grids_reference(columns, importance, scales, zeros, bits, price)
    table = costs(columns, importance, scales, zeros, bits, price)
    for index in (best, reference):
        chosen = table.gather(0, index.unsqueeze(0))[0]
        assert bool((chosen <= table.amin(0) * (1 + 1e-5)).all())


def test_of_equal_candidates_the_first_is_taken() -> None:
    columns = torch.randn(1, 8, 70, generator=generator(3)) * 0.03
    scales, zeros = torch.full((4, 1, 70), 0.02), torch.full((4, 1, 70), 3.0)
    scales[0] = 5.0
    for search in (cheapest_grids, cheapest_grids_reference):
        best = search(columns, torch.ones(1, 8), scales, zeros, 3, math.inf)
        assert bool((best == 1).all())


@quick
@given(
    n=st.integers(1, 40),
    rows=st.sampled_from([1, 3, 16, 255, 256, 257, 600]),
    bits=st.integers(2, 8),
    price=st.sampled_from([math.inf, 0.02, 1e-4]),
    shared=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_columns_are_rounded_alike(
    n: int, rows: int, bits: int, price: float, shared: bool, seed: int
) -> None:
    start = torch.randn(n, rows, generator=generator(seed)) * 0.1
    local = torch.randn(n, n, generator=generator(seed)).triu(1) * 0.1 + torch.eye(n)
    scales, zeros = grids(1 if shared else n, rows, bits, seed)
    scales, zeros = scales.expand(n, rows), zeros.expand(n, rows)
    one, other = start.clone(), start.clone()
    codes, errors, kept = round_columns(one, local, scales, zeros, bits, price)
    expected = round_columns_reference(other, local, scales, zeros, bits, price)
    # A tie that tips moves the rest of its row by what feedback makes of it.
    same = (codes == expected[0]).all(0) & torch.isclose(one, other, atol=1e-5).all(0)
    assert (kept is None) == (expected[2] is None)
    if kept is not None and expected[2] is not None:
        assert kept.dtype == torch.bool
        same &= (kept == expected[2]).all(0)
    assert float((~same).float().mean()) <= max(LARGEST_SHARE_DIFFERING, 1.5 / rows)
    torch.testing.assert_close(errors[:, same], expected[1][:, same], atol=1e-5, rtol=1e-4)


def test_kept_weights_lose_what_float16_loses() -> None:
    exponents = torch.randint(-10, 6, (4000,), generator=generator(0))
    values = torch.randn(4000, generator=generator(1)) * 10.0**exponents
    edges = [65504.0, 65519.9, 65520.0, 1e6, 6e-8, 2.9e-8, 3.1e-8, 2.0**-14, 0.0, -0.0]
    values = torch.cat([values, torch.tensor(edges)]).view(1, -1)
    grid = torch.ones(1, values.shape[1]), torch.zeros(1, values.shape[1])
    _, errors, kept = round_columns(values.clone(), torch.ones(1, 1), *grid, 2, 1e-30)
    assert kept is not None
    half = values.half().float()
    assert torch.equal(errors[kept], (values - half)[kept])
    # What float16 cannot hold stays a code, however much that loses, and what it makes zero.
    assert not bool(kept[~half.isfinite()].any())
    assert not bool(kept[half == 0].any())
    far = half.isfinite() & ((values < -1e-7) | (values > 3.5))
    assert bool(kept[far].all())


def test_shapes_that_do_not_fit_are_refused() -> None:
    extension = backend.native()
    assert extension is not None
    floats, codes = torch.zeros(3, 5), torch.zeros(3, 5, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"local must be \[n, n\]"):
        extension.round_columns(floats, floats, floats, floats, codes, floats, None, 3, 1.0)
    index = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"importance \[n\]"):
        extension.cheapest_grids(floats, torch.zeros(3), floats, floats, index, 3, 1.0)
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        extension.round_columns(floats, floats, floats, floats, codes, floats, None, 9, 1.0)
