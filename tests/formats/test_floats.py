"""Matrices that are not quantized lose no more than float16 rounds off."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantine.errors import FormatError
from quantine.formats.floats import NEGLIGIBLE, SHARE, as_asked, as_stored
from samples import random_weight

MATRIX = random_weight(24, 40)


def test_matrices_of_usual_size_become_float16() -> None:
    assert torch.equal(as_stored("x", MATRIX), MATRIX.half())
    assert as_stored("x", MATRIX.double()).dtype == torch.float16
    assert as_stored("x", torch.zeros(3, 4)).dtype == torch.float16


@given(st.integers(-40, 20), st.sampled_from([torch.float32, torch.float64]))
def test_no_row_or_column_loses_more_than_its_share(power: int, dtype: torch.dtype) -> None:
    matrix = (MATRIX * 2.0**power).to(dtype)
    stored = as_stored("x", matrix)
    change = stored.double() - matrix.double()
    for axis in (0, 1):
        assert bool((change.norm(dim=axis) <= SHARE * matrix.double().norm(dim=axis)).all())
    assert (stored.dtype == torch.float16) == (-9 < power < 19) or power in {-9, 19}


@pytest.mark.parametrize("axis", [0, 1])
def test_one_small_row_or_column_keeps_the_matrix_in_float32(axis: int) -> None:
    matrix = MATRIX.clone()
    matrix.select(axis, 3).mul_(1e-4)
    assert as_stored("x", matrix).dtype == torch.float32
    matrix.select(axis, 3).mul_(NEGLIGIBLE)  # now it does not count
    assert as_stored("x", matrix).dtype == torch.float16


def test_other_dtypes_and_vectors_stay_as_they_are() -> None:
    for tensor in (MATRIX.bfloat16() * 2.0**-30, MATRIX[0] * 1e-9, MATRIX[0].double()):
        assert as_stored("x", tensor) is tensor


def test_more_dimensions_are_rows_of_the_last() -> None:
    matrix = MATRIX.view(4, 6, 40).clone()
    matrix[2, 3] *= 1e-4
    assert as_stored("x", matrix).dtype == torch.float32


@pytest.mark.parametrize("tensor", [MATRIX, MATRIX[0], MATRIX[0, 0]])
def test_what_must_be_float16_is_refused_where_that_loses(tensor: torch.Tensor) -> None:
    assert as_stored("x", tensor, torch.float16).dtype == torch.float16
    for power in (-12, -30):
        with pytest.raises(FormatError, match=r"model\.norm reaches only .* use format sparse"):
            as_stored("model.norm", tensor * 2.0**power, torch.float16)
    with pytest.raises(FormatError, match=r"model\.norm reaches .* use format sparse"):
        as_stored("model.norm", tensor * 1e8, torch.float16)


def test_untrained_rows_do_not_keep_a_table_from_a_format_of_float16() -> None:
    table = MATRIX.bfloat16()
    table[7] *= 1e-20
    assert as_stored("x", table, torch.float16).dtype == torch.float16


def test_what_a_user_asks_for_is_rounded_and_only_overflow_refused() -> None:
    assert torch.equal(as_asked("x", MATRIX, torch.bfloat16), MATRIX.bfloat16())
    numbers = torch.arange(3)
    assert as_asked("x", numbers, torch.bfloat16) is numbers
    with pytest.raises(FormatError, match=r"float16 ends at 6\.55e\+04: ask for another") as caught:
        as_asked("x", MATRIX * 1e8, torch.float16)
    assert "plan" not in str(caught.value)
