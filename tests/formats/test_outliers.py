"""Places of outliers as gaps: bytes by hand, round trips, and damage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantine.core.sparse import Csr
from quantine.errors import FormatError
from quantine.formats.outliers import decode_gaps, encode_gaps, expected_bytes
from samples import quick


def at_places(places: list[int], rows: int, columns: int) -> Csr:
    """Outliers at places counted row after row, with values 0, 1, 2 and so on."""
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[places] = True
    kept = Csr.where(mask.view(rows, columns), torch.zeros(rows, columns))
    return Csr(kept.row_offsets, kept.columns, torch.arange(len(places)).half(), kept.shape)


def assert_same(left: Csr, right: Csr) -> None:
    assert torch.equal(left.row_offsets, right.row_offsets)
    assert torch.equal(left.columns, right.columns)
    assert torch.equal(left.values, right.values)
    assert left.shape == right.shape


@st.composite
def scattered(draw: st.DrawFn) -> Csr:
    rows, columns = draw(
        st.one_of(
            st.tuples(st.integers(1, 8), st.integers(1, 40)),
            st.sampled_from([(1, 70_001), (300, 257), (70_001, 1), (3, 70_000)]),
        )
    )
    share = draw(st.sampled_from([0.0, 1e-5, 1e-3, 0.01, 0.3, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    mask = torch.rand(rows, columns, generator=generator) < share
    return Csr.where(mask, torch.randn(rows, columns, generator=generator))


@quick
@given(outliers=scattered())
def test_decoding_inverts_encoding(outliers: Csr) -> None:
    stream = encode_gaps(outliers)
    assert stream.dtype in {torch.uint8, torch.int16}
    assert_same(decode_gaps(stream, outliers.values, outliers.shape), outliers)


@quick
@given(outliers=scattered())
def test_the_smaller_item_type_is_chosen(outliers: Csr) -> None:
    places = (outliers.row_indices() * outliers.shape[1] + outliers.columns).tolist()
    gaps = [after - before - 1 for before, after in zip([-1, *places], places, strict=False)]
    sizes = {
        torch.uint8: sum(gap // 255 + 1 for gap in gaps),
        torch.int16: 2 * sum(gap // 65535 + 1 for gap in gaps),
    }
    assert encode_gaps(outliers).nbytes == min(sizes.values())


@pytest.mark.parametrize(
    ("gap", "items"),
    [
        (0, [0]),
        (254, [254]),
        (255, [255, 0]),
        (256, [255, 1]),
        # Two bytes each way: the first type wins a tie.
        (509, [255, 254]),
        (510, [510]),
        (32_767, [32_767]),
        (32_768, [-32_768]),
        (65_534, [-2]),
        (65_535, [-1, 0]),
        (65_536, [-1, 1]),
        (131_069, [-1, -2]),
        (131_070, [-1, -1, 0]),
    ],
)
@pytest.mark.parametrize("columns", [1, 7, 200_000])
def test_gaps_at_the_limits_of_the_item_types(columns: int, gap: int, items: list[int]) -> None:
    kept = at_places([gap], -(-200_000 // columns), columns)
    stream = encode_gaps(kept)
    assert stream.tolist() == items
    assert stream.dtype == (torch.uint8 if gap < 510 else torch.int16)
    assert_same(decode_gaps(stream, kept.values, kept.shape), kept)


def test_gaps_run_over_the_ends_of_rows() -> None:
    # Three rows of four: the last of row 0, then the first and second of row 2.
    kept = at_places([3, 8, 9], 3, 4)
    stream = encode_gaps(kept)
    assert stream.tolist() == [3, 4, 0]
    assert stream.dtype == torch.uint8
    assert kept.row_offsets.tolist() == [0, 1, 1, 3]
    assert_same(decode_gaps(stream, kept.values, (3, 4)), kept)


def test_no_outliers_are_an_empty_stream() -> None:
    kept = at_places([], 3, 4)
    stream = encode_gaps(kept)
    assert stream.numel() == 0
    assert_same(decode_gaps(stream, kept.values, (3, 4)), kept)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
@pytest.mark.parametrize(
    ("items", "values"),
    [
        ([0, 0], 1),  # more places than values
        ([0], 2),  # fewer
        ([], 1),
        ([0, 11], 2),  # the twelve weights end one place before
        ([11, 0], 2),
        ([12], 1),
        ([-1], 1),  # a run without an outlier after it
        ([0, -1], 1),
        ([-1, 0], 1),
        ([0, 0, 0], 0),
    ],
)
def test_damaged_streams_are_refused(items: list[int], values: int, dtype: torch.dtype) -> None:
    stream = torch.tensor(items, dtype=torch.int64).to(dtype)
    with pytest.raises(FormatError, match="outlier_gap is damaged"):
        decode_gaps(stream, torch.zeros(values).half(), (3, 4))


@pytest.mark.parametrize("share", [0.001, 0.005, 0.02, 0.1])
def test_a_place_costs_about_a_byte(share: float) -> None:
    mask: Tensor = torch.rand(256, 600, generator=torch.Generator().manual_seed(0)) < share
    kept = Csr.where(mask, torch.zeros(256, 600))
    bits = 8 * encode_gaps(kept).nbytes / kept.entries
    assert bits <= (16.5 if share < 0.002 else 11 if share < 0.01 else 8.1)


@pytest.mark.parametrize("share", [2.0**-32, 1e-9, 1e-7])
def test_few_outliers_cost_the_items_that_pass_over_all_others(share: float) -> None:
    per_weight = share * (expected_bytes(share) - 2)
    assert per_weight == pytest.approx(2 / (2**16 - 1), rel=0.01)


@pytest.mark.parametrize("share", [5e-324, 1e-45, 1e-17])
def test_next_to_no_outliers_cost_next_to_nothing(share: float) -> None:
    assert 0 <= 1e12 * share * expected_bytes(share) < 4


def test_all_or_no_outliers() -> None:
    assert expected_bytes(0.0) == 0.0
    assert expected_bytes(1.0) == 3.0
