"""Matrices of outliers against the dense matrix they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from samples import quick


@st.composite
def masked(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A mask and values of one shape; rows and masks may be empty."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    mask = torch.rand(rows, columns, generator=generator) < share
    return mask, torch.randn(rows, columns, generator=generator)


def test_by_hand() -> None:
    mask = torch.tensor([[False, True, True], [False, False, False], [True, False, False]])
    kept = Csr.where(mask, torch.arange(9).float().view(3, 3))
    assert kept.row_offsets.tolist() == [0, 2, 2, 3]
    assert kept.columns.tolist() == [1, 2, 0]
    assert kept.values.tolist() == [1.0, 2.0, 6.0]
    assert kept.row_indices().tolist() == [0, 0, 2]
    assert (kept.entries, kept.shape) == (3, (3, 3))
    types = (kept.row_offsets.dtype, kept.columns.dtype, kept.values.dtype)
    assert types == (torch.int64, torch.int64, torch.float16)


@quick
@given(case=masked(), transposed=st.booleans())
def test_values_replace_those_under_the_mask_and_no_others(
    case: tuple[Tensor, Tensor], transposed: bool
) -> None:
    mask, values = case
    if transposed:  # as solvers hold them: not contiguous
        mask, values = mask.T.contiguous().T, values.T.contiguous().T
    dense = torch.full(mask.shape, 7.0)
    Csr.where(mask, values).replace_in(dense)
    assert torch.equal(dense, torch.where(mask, values.half().float(), 7.0))


@quick
@given(case=masked(), picked=st.lists(st.integers(0, 5), max_size=8))
def test_chosen_rows_in_any_order_and_repeated(
    case: tuple[Tensor, Tensor], picked: list[int]
) -> None:
    mask, values = case
    rows = torch.tensor([row % len(mask) for row in picked], dtype=torch.int64)
    found, expected = Csr.where(mask, values).rows(rows), Csr.where(mask[rows], values[rows])
    assert torch.equal(found.row_offsets, expected.row_offsets)
    assert torch.equal(found.columns, expected.columns)
    assert torch.equal(found.values, expected.values)
    assert found.shape == expected.shape


@pytest.mark.parametrize("order", [None, [2, 0, 3, 1]])
def test_outliers_are_places_of_stored_columns(order: list[int] | None) -> None:
    grid = Grid(torch.ones(1, 1).half(), torch.zeros(1, 1, dtype=torch.uint8), 2, 4)
    codes = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    kept = Csr.where(torch.tensor([[False, True, False, False]]), torch.full((1, 4), -8.5))
    stored = [0.0, -8.5, 2.0, 3.0]
    in_perm = None if order is None else torch.tensor(order)
    weight = QTensor(codes, grid, in_perm, kept).dequantize()[0].tolist()
    places = order or range(4)
    assert [weight[place] for place in places] == stored
