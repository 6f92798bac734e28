"""Products on GPUs, in Triton's interpreter, against the PyTorch reference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_device import DEVICE, EXAMPLES, moved
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_matrix import ZEROS, qtensor_of, reach
from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.core.spec import GroupAxis
from quantine.kernels.matrix import rows_of
from quantine.kernels.matrix.reference import multiply_reference
from quantine.kernels.matrix.units.activations import arrange_reference, rows_reference
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix, unit_matrix

triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from quantine.kernels.matrix.triton import few_rows, many_rows, product  # noqa: E402
from quantine.kernels.matrix.triton.arrange import arrange, arrange_rows  # noqa: E402

FEW_TOLERANCE = 4e-3
"""Of what the sums could reach, where 16 products are summed in float16."""
MANY_TOLERANCE = 2e-3
"""Likewise, where weights and activations are float16 and sums float32."""

kinds = {
    "seed": st.integers(0, 2**16),
    "bits": st.integers(2, 8),
    "scale": st.sampled_from(["half", "coded"]),
    "zero": st.sampled_from(ZEROS),
    "outliers": st.sampled_from([0.0, 0.02, 0.3]),
    "ordered": st.booleans(),
}
along_inputs = st.builds(
    qtensor_of,
    lines=st.integers(1, 7),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([16, 32, 48, 64, 128]),
    **kinds,
)
one_group = st.builds(
    qtensor_of, lines=st.integers(1, 9), groups=st.just(1), group_size=st.integers(1, 200), **kinds
)
of_outputs = kinds | {
    "groups": st.integers(1, 2),
    "group_size": st.sampled_from([4, 8, 16]),
    "axis": st.just("out"),
}
along_outputs = st.builds(qtensor_of, lines=st.integers(1, 150), **of_outputs)
few_inputs = st.builds(qtensor_of, lines=st.integers(1, 40), **of_outputs)
few_outputs = st.builds(
    qtensor_of,
    lines=st.integers(1, 40),
    **(of_outputs | {"groups": st.just(1), "group_size": st.sampled_from([3, 4, 6, 8])}),
)
whole_or_groups = st.one_of(along_inputs, one_group)
matrices = st.one_of(whole_or_groups, along_outputs)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def arranged(q: QTensor) -> UnitMatrix:
    matrix = unit_matrix(moved(q))
    assert matrix is not None
    return matrix


def activations(seed: int, batch: int, columns: int, size: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, columns, generator=generator) * size
    x[:, :: max(1, columns // 3)] *= 100.0  # outliers among the channels
    return x.to(DEVICE)


def assert_close(found: Tensor, q: QTensor, x: Tensor, tolerance: float) -> None:
    found, x = found.cpu(), x.cpu()
    expected = multiply_reference(q, x, "exact")
    largest = x.abs().amax(1, keepdim=True)  # what is far below it is lost in float16
    size = x.abs() @ reach(q).T + 2.0**-20 * largest * reach(q).sum(1)
    assert bool(((found - expected).abs() <= tolerance * size).all())


# Rows that a program reads in several turns; eight warps take 32768 inputs at once.
LONG_IN = qtensor_of(1, 3, 260, 128, 3, "coded", "coded", 0.02, True)
LONG_OUT = qtensor_of(2, 33000, 1, 4, 4, "half", "half", 0.01, False, "out")
BLOCKS_IN = qtensor_of(3, 33, 33, 128, 3, "coded", "coded", 0.02, True)  # programs of two blocks
TIGHT_IN = qtensor_of(3, 33, 5, 32, 5, "coded", "coded", 0.0, True)
BLOCKS_OUT = qtensor_of(3, 40, 2, 16, 4, "half", "half", 0.02, True, "out")
ODD_OUT = qtensor_of(3, 21, 2, 3, 7, "coded", "half", 0.3, True, "out")  # each row a program


one = {"batch": st.just(1), "seed": st.integers(0, 99), "dtype": dtypes}
several = one | {"batch": st.integers(2, few_rows.FEW)}
many = one | {"batch": st.integers(few_rows.FEW + 1, 70)}


def check_few(q: QTensor, batch: int, seed: int, dtype: torch.dtype) -> None:
    matrix, x = arranged(q), activations(seed, batch, q.codes.shape[1], 1.0).to(dtype)
    found = few_rows.multiply(matrix, arrange(x, matrix), torch.float32)
    assert_close(found, q, x.float(), FEW_TOLERANCE)


def check_many(q: QTensor, batch: int, seed: int, dtype: torch.dtype) -> None:
    matrix, x = arranged(q), activations(seed, batch, q.codes.shape[1], 1.0).to(dtype)
    found = many_rows.multiply(matrix, arrange_rows(x, matrix), torch.float32)
    assert_close(found, q, x.float(), MANY_TOLERANCE)


@settings(max_examples=EXAMPLES)
@given(q=whole_or_groups, **one)
@example(q=LONG_IN, batch=1, seed=0, dtype=torch.float16)
def test_one_row(q: QTensor, batch: int, seed: int, dtype: torch.dtype) -> None:
    check_few(q, batch, seed, dtype)


@settings(max_examples=EXAMPLES)
@given(q=whole_or_groups, **several)
@example(q=LONG_IN, batch=3, seed=0, dtype=torch.float16)
@example(q=BLOCKS_IN, batch=4, seed=1, dtype=torch.float32)
@example(q=TIGHT_IN, batch=2, seed=2, dtype=torch.float16)
def test_several_rows(q: QTensor, batch: int, seed: int, dtype: torch.dtype) -> None:
    check_few(q, batch, seed, dtype)


@settings(max_examples=EXAMPLES)
@given(q=few_inputs, **one)
@example(q=LONG_OUT, batch=1, seed=1, dtype=torch.float32)
@example(q=ODD_OUT, batch=1, seed=2, dtype=torch.float16)
def test_one_row_along_outputs(q: QTensor, batch: int, seed: int, dtype: torch.dtype) -> None:
    check_few(q, batch, seed, dtype)


@settings(max_examples=EXAMPLES)
@given(q=few_outputs, **several)
@example(q=LONG_OUT, batch=2, seed=1, dtype=torch.float32)
@example(q=BLOCKS_OUT, batch=3, seed=2, dtype=torch.float16)
@example(q=ODD_OUT, batch=4, seed=2, dtype=torch.float16)
def test_several_rows_along_outputs(q: QTensor, batch: int, seed: int, dtype: torch.dtype) -> None:
    check_few(q, batch, seed, dtype)


@settings(max_examples=EXAMPLES)
@given(q=whole_or_groups, **many)
def test_many_rows(q: QTensor, batch: int, seed: int, dtype: torch.dtype) -> None:
    check_many(q, batch, seed, dtype)


@settings(max_examples=EXAMPLES)
@given(q=along_outputs, **many)
@example(q=ODD_OUT, batch=9, seed=2, dtype=torch.float16)
def test_many_rows_along_outputs(q: QTensor, batch: int, seed: int, dtype: torch.dtype) -> None:
    check_many(q, batch, seed, dtype)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 6e4, 1e30])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_activations_of_any_size(size: float, axis: GroupAxis) -> None:
    q = qtensor_of(1, 9, 3, 32, 8, "half", "whole", 0.02, False, axis)
    matrix, x = arranged(q), activations(2, 2, q.codes.shape[1], size)
    few = few_rows.multiply(matrix, arrange(x, matrix), torch.float32)
    many = many_rows.multiply(matrix, arrange_rows(x, matrix), torch.float32)
    for found in (few, many):
        assert_close(found / size, q, x / size, FEW_TOLERANCE)


@pytest.mark.filterwarnings("ignore:invalid value")  # of NumPy, in the interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    q = qtensor_of(1, 8, 2, 32, 4, "half", "whole", 0.0, False)
    matrix, x = arranged(q), activations(2, 2, 64, 1.0)
    x[1, 5] = value
    found = few_rows.multiply(matrix, arrange(x, matrix), torch.float32)
    assert bool(found[0].isfinite().all())
    assert not bool(found[1].isfinite().any())


@settings(max_examples=EXAMPLES)
@given(q=matrices, batch=st.integers(1, 4), seed=st.integers(0, 99), dtype=dtypes)
def test_arrangement(q: QTensor, batch: int, seed: int, dtype: torch.dtype) -> None:
    matrix, x = arranged(q), activations(seed, batch, q.codes.shape[1], 10.0).to(dtype)
    found, expected = arrange(x, matrix), arrange_reference(x, matrix)
    assert torch.equal(found.words, expected.words)
    assert torch.equal(found.factors, expected.factors)
    if expected.sums is not None:
        assert found.sums is not None
        assert torch.allclose(found.sums, expected.sums, rtol=1e-5, atol=1e-4)
    rows = arrange_rows(x, matrix)
    assert torch.equal(rows.halves, rows_reference(x, matrix).halves)


@pytest.mark.parametrize("axis", ["in", "out"])
def test_rows_are_as_they_are_alone(axis: GroupAxis) -> None:
    """All rows that are multiplied together have their own activations, and their own results."""
    q = qtensor_of(1, 16, 1, 16, 3, "coded", "coded", 0.02, True, axis)
    matrix, x = arranged(q), activations(2, 4, q.codes.shape[1], 1.0)
    together = few_rows.multiply(matrix, arrange(x, matrix), torch.float32)
    for row, found in zip(x, together, strict=True):
        alone = few_rows.multiply(matrix, arrange(row[None], matrix), torch.float32)
        assert torch.allclose(found, alone[0], rtol=1e-2, atol=1e-2 * float(alone.abs().max()))


@pytest.mark.parametrize("batch", [0, 1, 4, 5])
def test_the_operator(batch: int) -> None:
    q = qtensor_of(3, 33, 5, 32, 3, "coded", "coded", 0.02, True)
    matrix, x = arranged(q), activations(2, batch, 160, 1.0).half()
    found = product.multiply(matrix, x)
    assert found.dtype == torch.float16
    assert found.shape == (batch, 33)
    if batch:
        assert_close(found.float(), q, x.float(), FEW_TOLERANCE)


def test_the_operator_is_whole_to_compilers() -> None:
    q = qtensor_of(3, 33, 5, 32, 3, "coded", "coded", 0.02, True)
    operands = (activations(2, 2, 160, 1.0), *arranged(q).parts())
    outcomes = torch.library.opcheck(torch.ops.quantine.multiply_units.default, operands)
    assert set(outcomes.values()) == {"SUCCESS"}


@settings(max_examples=EXAMPLES)
@given(q=matrices, dtype=dtypes)
def test_decoding(q: QTensor, dtype: torch.dtype) -> None:
    matrix = arranged(q)
    found = many_rows.decode(matrix, dtype).cpu()
    first, stop = matrix.rows // 3, matrix.rows // 3 + 2
    assert torch.equal(many_rows.decode(matrix, dtype, first, stop).cpu(), found[first:stop])
    if q.outliers is None:
        rows = torch.tensor([matrix.rows - 1, 0, 0], device=DEVICE)
        assert torch.equal(rows_of(matrix, rows, dtype).cpu(), found[rows.cpu()])
    expected, size = q.dequantize(), reach(q)
    assert found.dtype == dtype
    # Tiny weights among large ones of the same matrix are rounded to multiples of a subnormal.
    bound = (torch.finfo(dtype).eps + 2e-3) * size + 2.0**-22 * size.max()
    assert bool(((found.float() - expected).abs() <= bound).all())


@pytest.mark.parametrize("axis", ["in", "out"])
def test_large_matrices_are_decoded_in_panels(
    axis: GroupAxis, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = qtensor_of(7, 150, 1, 40, 3, "half", "whole", 0.02, True, axis)
    if axis == "out":
        q = qtensor_of(7, 40, 2, 75, 3, "half", "whole", 0.02, True, axis)
    matrix, x = arranged(q), activations(3, 5, q.codes.shape[1], 1.0)
    whole = many_rows.multiply_decoded(matrix, x)
    sizes = []

    def decode(*asked: Any) -> Tensor:
        found = decode_of(*asked)
        sizes.append(len(found))
        return found

    decode_of = many_rows.decode
    monkeypatch.setattr(many_rows, "decode", decode)
    monkeypatch.setattr(many_rows, "PANEL", 64 * q.codes.shape[1])
    assert torch.allclose(many_rows.multiply_decoded(matrix, x), whole, rtol=1e-5, atol=1e-5)
    assert sizes == [64, 64, 22]
    assert_close(whole, q, x, MANY_TOLERANCE)


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("zero", ["whole", "half"])
def test_weights_too_small_for_float16(axis: GroupAxis, zero: str) -> None:
    q = qtensor_of(5, 9, 3, 32, 4, "half", zero, 0.02, False, axis)
    assert q.outliers is not None
    tiny = replace(q.outliers, values=q.outliers.values.float() * 2.0**-40)
    small = replace(q, grid=replace(q.grid, exponent=-40), outliers=tiny)
    matrix, x = arranged(small), activations(2, 2, q.codes.shape[1], 1.0)
    few = few_rows.multiply(matrix, arrange(x, matrix), torch.float32)
    many = many_rows.multiply(matrix, arrange_rows(x, matrix), torch.float32)
    decoded = x.cpu() @ many_rows.decode(matrix, torch.float32).cpu().T
    for found in (few, many, decoded):
        assert_close(found * 2.0**40, q, x, FEW_TOLERANCE)


@pytest.mark.parametrize("axis", ["in", "out"])
def test_small_rows_are_as_precise_as_large_ones(axis: GroupAxis) -> None:
    q = qtensor_of(5, 32 if axis == "in" else 64, 4, 16, 4, "half", "whole", 0.0, False, axis)
    small = 2.0 ** -torch.arange(len(q.grid.scale) if axis == "in" else 4).mul(4).clamp(max=12)
    scale = q.grid.scale * (small[:, None] if axis == "in" else small[None, :])
    q = replace(q, grid=replace(q.grid, scale=scale.half()))
    matrix, x = arranged(q), activations(2, 8, q.codes.shape[1], 1.0)
    expected = x.cpu() @ q.dequantize().T
    decoded = x.cpu() @ many_rows.decode(matrix, torch.float32).cpu().T
    many = many_rows.multiply(matrix, arrange_rows(x, matrix), torch.float32).cpu()
    for found in (many, decoded):
        error = (found - expected).norm(dim=0) / expected.norm(dim=0)
        assert float(error.max()) <= 2e-3
