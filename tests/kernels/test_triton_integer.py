"""Integer products on GPUs, in Triton's interpreter, against the PyTorch reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from gpu_device import DEVICE, EXAMPLES, moved
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_integer import ZEROS, grid_of, qtensor_of, reach
from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.qtensor import QTensor
from quantine.kernels import integer
from quantine.kernels.integer.input_grid import InputGrid
from quantine.kernels.integer.reference import multiply_reference
from quantine.kernels.integer.units.gridded_matrix import GriddedMatrix, gridded_matrix
from quantine.kernels.integer.units.inputs import round_reference
from quantine.kernels.integer.units.layout import BYTE, LANES, pack_quads, pieces, unpack_quads

triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from quantine.kernels.integer.triton import few_rows, many_rows  # noqa: E402

TOLERANCE = 3e-6
"""Of what the sums could reach: as of the native kernels, but for float32 in another order."""

sizes = st.one_of(
    st.lists(st.one_of(st.integers(1, 9), st.integers(1, 100)), min_size=1, max_size=5),
    st.lists(st.sampled_from([32, 64, 128, 129]), min_size=1, max_size=3),
    st.lists(st.just(128), min_size=1, max_size=3),
)
kinds = st.sampled_from(["inside", "beyond", "token", "factors"])
bits_of_inputs = st.sampled_from([8, 4, 2, 3, 5, 6, 7])
of_matrices = {
    "seed": st.integers(0, 2**16),
    "sizes": sizes,
    "bits": st.integers(2, 8),
    "zero": st.sampled_from(ZEROS),
    "outliers": st.sampled_from([0.0, 0.0, 0.02, 0.3]),
    "ordered": st.booleans(),
}
low_matrices = st.builds(qtensor_of, rows=st.integers(1, 6), **of_matrices)
matrices = st.builds(qtensor_of, rows=st.integers(1, 70), **of_matrices)


def gridded(q: QTensor, grid: InputGrid) -> GriddedMatrix:
    matrix = gridded_matrix(moved(q), moved(grid))
    assert matrix is not None
    return matrix


def activations(seed: int, batch: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, columns, generator=generator).to(DEVICE)


def assert_close(found: Tensor, q: QTensor, grid: InputGrid, x: Tensor) -> None:
    found, x = found.cpu(), x.cpu()
    expected = multiply_reference(q, grid, x)
    assert bool(((found - expected).abs() <= TOLERANCE * reach(q, grid, x) + 1e-30).all())


@settings(max_examples=EXAMPLES)
@given(q=low_matrices, kind=kinds, bits=bits_of_inputs, batch=st.sampled_from([1, 1, 2, 3, 4]))
@example(q=qtensor_of(0, 5, [1] * 9, 4), kind="inside", bits=8, batch=1)
@example(q=qtensor_of(1, 3, [33000, 40], 3, "whole", 0.02), kind="factors", bits=4, batch=2)
def test_few_rows(q: QTensor, kind: str, bits: int, batch: int) -> None:
    grid, x = grid_of(batch, kind, len(q.grid.sizes), bits), activations(bits, batch, columns(q))
    matrix = gridded(q, grid)
    found = few_rows.multiply(matrix, round_reference(x, matrix.inputs, True), torch.float32)
    assert_close(found, q, grid, x)


@settings(max_examples=EXAMPLES)
@given(q=matrices, kind=kinds, bits=bits_of_inputs, batch=st.integers(1, 70))
@example(q=qtensor_of(0, 65, [1] * 9, 8), kind="inside", bits=8, batch=17)
@example(q=qtensor_of(1, 3, [40, 300, 3], 5, "half", 0.1), kind="beyond", bits=8, batch=130)
def test_many_rows(q: QTensor, kind: str, bits: int, batch: int) -> None:
    grid, x = grid_of(batch, kind, len(q.grid.sizes), bits), activations(bits, batch, columns(q))
    matrix = gridded(q, grid)
    found = many_rows.multiply(matrix, round_reference(x, matrix.inputs), torch.float32)
    assert_close(found, q, grid, x)


def columns(q: QTensor) -> int:
    return q.codes.shape[1]


@pytest.mark.parametrize("kind", ["inside", "token"])
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_the_largest_codes(bits: int, kind: str) -> None:
    top, length = 2**bits - 1, 256
    for code in (0, top):
        for zero in (0, top):
            codes = torch.full((3, length), code, dtype=torch.uint8)
            points = torch.full((3, 1), zero, dtype=torch.uint8)
            q = QTensor(codes, Grid(torch.ones(3, 1).half(), points, bits, length))
            grid = InputGrid(8)
            x = torch.full((17, length), 255.0, device=DEVICE)
            x[:, ::2] = 0.0  # so that a token's own grid is the same
            if kind == "inside":
                grid = InputGrid(8, torch.ones(1), torch.zeros(1))
            matrix = gridded(q, grid)
            few = few_rows.multiply(matrix, round_reference(x[:1], matrix.inputs, True), x.dtype)
            many = many_rows.multiply(matrix, round_reference(x, matrix.inputs), x.dtype)
            for found in (few, many):
                assert bool(found.eq((code - zero) * 255.0 * length / 2).all())


@pytest.mark.parametrize("batch", [0, 1, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_whole_products(batch: int, dtype: torch.dtype) -> None:
    q = qtensor_of(3, 9, [40, 7, 64], 3, "coded", 0.02, True)
    grid = grid_of(1, "factors", 3, 8)
    x = activations(2, batch, 111).to(dtype)
    found = integer.multiply_gridded(gridded(q, grid), x)
    assert found.dtype == dtype
    assert found.shape == (batch, 9)
    if batch:
        expected = multiply_reference(q, grid, x.float().cpu())
        error = (found.float().cpu() - expected).abs()
        bound = torch.finfo(dtype).eps * expected.abs() + TOLERANCE * reach(
            q, grid, x.float().cpu()
        )
        assert bool((error <= bound).all())


def test_matrices_with_equal_inputs_share_what_is_rounded() -> None:
    grid, x = grid_of(1, "factors", 2, 8), activations(2, 3, 50)
    several = [qtensor_of(seed, 9, [20, 30], bits) for seed, bits in ((1, 4), (2, 3))]
    shared = integer.rounded(x, gridded(several[0], grid).inputs)
    for q in several:
        found = integer.multiply_rounded(gridded(q, grid), shared, torch.float32)
        assert_close(found, q, grid, x)


def test_weights_too_small_for_float16() -> None:
    q, grid = qtensor_of(5, 9, [40, 33], 4, "half", 0.02), grid_of(1, "inside", 2, 8)
    assert q.outliers is not None
    tiny = replace(q.outliers, values=q.outliers.values.float() * 2.0**-40)
    small = replace(q, grid=replace(q.grid, exponent=-40), outliers=tiny)
    for batch in (1, 6):
        x = activations(2, batch, 73)
        found = integer.multiply_gridded(gridded(small, grid), x)
        assert_close(found * 2.0**40, q, grid, x)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow)")  # of NumPy, in the interpreter
@pytest.mark.parametrize("batch", [4, 5])
def test_what_is_not_finite(batch: int) -> None:
    q = qtensor_of(1, 4, [7, 64, 3], 4)
    x = activations(3, batch, 74)
    x[1, 20], x[3, 4] = math.inf, -math.inf
    grid = grid_of(1, "inside", 3, 8)
    assert_close(integer.multiply_gridded(gridded(q, grid), x), q, grid, x)  # codes at the ends
    x[2, 70] = math.nan
    for kind, lost in (("inside", [2]), ("factors", [2]), ("token", [1, 2, 3])):
        found = integer.multiply_gridded(gridded(q, grid_of(1, kind, 3, 8)), x).cpu()
        assert found.isnan().all(1).nonzero().flatten().tolist() == lost
        assert int(found.isfinite().all(1).sum()) == batch - len(lost)


def test_what_is_not_taken() -> None:
    grid, q = InputGrid(8), qtensor_of(0, 16, [16], 4)
    turned = QTensor(q.codes, Grid(torch.ones(16, 1).half(), None, 4, 16, "out"))
    assert gridded_matrix(turned, grid) is None
    codes = torch.empty(2**20, 2**14, dtype=torch.uint8, device="meta")
    huge = QTensor(codes, Grid(torch.ones(1, 1).half(), None, 4, 2**14))
    assert gridded_matrix(huge, grid) is None
    # On the CPU native kernels multiply.
    assert integer.gridded_matrix(q, grid) is None


def test_operators_are_whole_to_compilers() -> None:
    q, grid = qtensor_of(3, 5, [40, 7], 3, "whole", 0.02, True), grid_of(1, "factors", 2, 8)
    matrix = gridded(q, grid)
    for batch in (2, 5):
        x = activations(2, batch, 47)
        made = integer.rounded(x, matrix.inputs)
        for operator, operands in (
            ("round_inputs", (x, *matrix.inputs.parts(), batch == 2, False)),
            (
                "multiply_rounded",
                (made.codes, made.sums, made.scale, made.shift, *matrix.parts(), x.dtype),
            ),
        ):
            packet = getattr(torch.ops.quantine, operator)
            outcomes = torch.library.opcheck(packet.default, operands)
            assert set(outcomes.values()) == {"SUCCESS"}


@pytest.mark.parametrize("batch", [2, 5])
def test_shapes_on_the_meta_device(batch: int) -> None:
    q, grid = qtensor_of(3, 5, [40, 7], 3, "whole", 0.02, True), grid_of(1, "inside", 2, 8)
    matrix = gridded(q, grid)
    x = activations(2, batch, 47).half()
    there, here = (integer.rounded(x, matrix.inputs).codes for _ in range(2))
    elsewhere = moved(matrix, "meta")
    rounded = integer.rounded(x.to("meta"), elsewhere.inputs)
    assert (rounded.codes.shape, rounded.codes.dtype) == (there.shape, here.dtype)
    found = integer.multiply_rounded(elsewhere, rounded, x.dtype)
    assert found.is_meta
    assert (found.shape, found.dtype) == ((batch, 5), torch.float16)


@pytest.mark.parametrize("batch", [1, 6])
def test_compilers_take_whole_products(batch: int) -> None:
    q, grid = qtensor_of(3, 5, [40, 7], 3), grid_of(1, "factors", 2, 8)
    matrix, x = gridded(q, grid), activations(2, batch, 47)
    whole = torch.compile(integer.multiply_gridded, backend="eager", fullgraph=True)
    assert torch.equal(whole(matrix, x), integer.multiply_gridded(matrix, x))


@pytest.mark.parametrize("bits", range(2, 9))
def test_units_hold_every_code(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 96), generator=torch.Generator().manual_seed(bits)).byte()
    words = pack_quads(codes, bits)
    assert words.shape == (3, bits, 3)
    assert torch.equal(unpack_quads(words, bits), codes)
    places = [piece for quad in pieces(bits) for piece in quad]
    used = {(p.word, bit) for p in places for bit in range(p.offset, p.offset + p.width)}
    assert len(used) == sum(p.width for p in places) == bits * BYTE == 32 * bits // LANES
