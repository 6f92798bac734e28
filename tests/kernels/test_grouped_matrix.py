"""Products of several experts in one step: every instruction set against the PyTorch reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_matrix import arithmetics, axes, close, qtensor_of, reach

from quantine.core.arithmetic import Arithmetic
from quantine.core.qtensor import QTensor
from quantine.core.spec import GroupAxis
from quantine.kernels.matrix import FEW_ROWS, grouped_product, multiply_grouped, packed_matrix
from quantine.kernels.matrix.reference import multiply_grouped_reference


def some_expert(seed: int, axis: GroupAxis) -> tuple[QTensor, QTensor]:
    """Two matrices with 64 inputs, of 48 and 80 outputs; each expert has bits of its own."""
    bits, ordered, outliers = 2 + seed % 7, seed % 2 == 1, (0.0, 0.02)[seed % 3 == 0]
    pair = (48, "half", "whole"), (80, "coded", "coded")
    if axis == "in":
        return tuple(  # type: ignore[return-value]
            qtensor_of(seed, rows, 4, 16, bits, scale, zero, outliers, ordered)
            for rows, scale, zero in pair
        )
    return tuple(  # type: ignore[return-value]
        qtensor_of(seed, 64, rows // 16, 16, bits, scale, zero, outliers, ordered, "out")
        for rows, scale, zero in pair
    )


@pytest.mark.usefixtures("level")
@given(
    st.lists(st.sampled_from([0, 0, 1, 2, 7, 33]), min_size=1, max_size=6),
    axes,
    st.integers(0, 2**16),
    arithmetics,
)
@example([0, 40, 0], "in", 0, "fast")  # one has all rows
@example([0, 0], "out", 1, "exact")
def test_experts_multiply_rows_of_their_own(
    counts: list[int], axis: GroupAxis, seed: int, arithmetic: Arithmetic
) -> None:
    experts = [some_expert(seed + number, axis) for number in range(len(counts))]
    x = torch.randn(sum(counts), 64, generator=torch.Generator().manual_seed(seed))
    matrices = [[packed_matrix(q) for q in qs] for qs in experts]
    found = multiply_grouped(matrices, x, counts, arithmetic)
    expected = multiply_grouped_reference(experts, x, counts, arithmetic)
    assert [y.shape for y in found] == [y.shape for y in expected]
    for place, (result, wanted) in enumerate(zip(found, expected, strict=True)):
        parts = zip(experts, *(t.split(counts) for t in (result, wanted, x)), strict=True)
        assert all(close(y, e, rows, reach(qs[place])) for qs, y, e, rows in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_with_many_rows_are_multiplied_beside_the_others(dtype: torch.dtype) -> None:
    counts = [2, FEW_ROWS + 1, FEW_ROWS, 1, FEW_ROWS + 9]
    experts = [some_expert(number, "in") for number in range(len(counts))]
    x = torch.randn(sum(counts), 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    matrices = [[packed_matrix(q) for q in qs] for qs in experts]
    found = grouped_product(matrices, x, counts, "exact")
    expected = multiply_grouped_reference(experts, x.float(), counts, "exact")
    for result, wanted in zip(found, expected, strict=True):
        assert result.dtype == dtype
        near = 4 * torch.finfo(dtype).eps * float(wanted.abs().max())
        assert float((result.float() - wanted).abs().max()) <= near + 1e-5


def test_counts_of_rows_are_checked() -> None:
    matrix = packed_matrix(some_expert(0, "in")[0])
    x = torch.ones(3, 64)
    for counts in ([1, 1], [2, 2], [3]):
        with pytest.raises(ValueError, match="count"):
            multiply_grouped([[matrix], [matrix]], x, counts, "fast")
