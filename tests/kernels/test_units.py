"""The layout of packed matrices on GPUs, in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantine.core.grid import Grid
from quantine.core.qtensor import QTensor
from quantine.kernels.matrix.units.activations import LARGEST, row_factors
from quantine.kernels.matrix.units.instructions import unit_product
from quantine.kernels.matrix.units.layout import pack_units, pieces, unpack_units
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix, unit_matrix

BITS = range(2, 9)


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_of_a_word_is_used_once(bits: int) -> None:
    used = [
        (place.word, bit)
        for pair in pieces(bits)
        for place in pair
        for bit in range(place.offset, place.offset + place.width)
    ]
    assert sorted(used) == [(word, bit) for word in range(bits) for bit in range(16)]


@given(
    bits=st.integers(2, 8), rows=st.integers(1, 5), columns=st.integers(1, 300), seed=st.integers(0)
)
def test_units_hold_all_codes_in_no_more_bits(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**32)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    words = pack_units(codes, bits)
    assert torch.equal(unpack_units(words, bits, columns), codes)
    assert words.numel() * 32 == rows * -(-columns // 128) * 128 * bits


@pytest.mark.parametrize(("bits", "most"), [(3, 55), (4, 55), (2, 55), (8, 60), (5, 65)])
def test_a_unit_takes_few_instructions(bits: int, most: int) -> None:
    """Instructions bound what is read: 32 are products and centering, the rest take codes out."""
    lines = unit_product(bits)[0].split("\n")
    counted = [line for line in lines if line.startswith(("lop3", "shr", "shl"))]
    counted += [line for line in lines if "f16x2" in line]
    assert len(counted) <= most


def test_activations_are_divided_by_powers_of_two() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-30, -3e30], [7.9, 1.0], [8.0, -8.0], [-1e-38, 0.0]])
    factors = row_factors(x)
    assert torch.equal(factors.log2(), factors.log2().round())
    largest = (x / factors.unsqueeze(1)).abs().amax(1)
    assert bool((largest[1:] < 2**LARGEST).all())
    assert bool((largest[1:] >= 2 ** (LARGEST - 1)).all())
    assert float(factors[0]) == 1.0


def test_taken_apart_and_put_together() -> None:
    codes = torch.zeros(4, 64, dtype=torch.uint8)
    for axis, lines in (("in", 4), ("out", 64)):
        groups = 64 * 4 // lines // 4
        grid = Grid(torch.ones(lines, groups).half(), None, 3, 4 if axis == "out" else 16, axis)
        if axis == "in":
            grid = Grid(torch.ones(4, 4).half(), None, 3, 16, "in")
        matrix = unit_matrix(QTensor(codes, grid))
        assert matrix is not None
        again = UnitMatrix.of_parts(*matrix.parts())
        assert again.groups == matrix.groups or again.parts()[1] == matrix.parts()[1]
        for one, other in zip(matrix.parts()[0], again.parts()[0], strict=True):
            assert one is other


def test_what_the_layout_cannot_hold() -> None:
    codes = torch.zeros(4, 48, dtype=torch.uint8)
    odd = Grid(torch.ones(4, 4).half(), None, 4, 12)
    clusters = Grid(torch.ones(4, 2).half(), None, 4, 16, sizes=(16, 32))
    wide = QTensor(
        torch.zeros(1, 2**16 + 1, dtype=torch.uint8), Grid(torch.ones(1, 1).half(), None, 4, 2**17)
    )
    assert unit_matrix(QTensor(codes, odd)) is None
    assert unit_matrix(QTensor(codes, clusters)) is None
    assert unit_matrix(wide) is None


@pytest.mark.parametrize(("zero", "held"), [(-500.0, True), (519.0, True), (-600.0, False)])
def test_zero_points_along_outputs_are_held_where_their_sums_are(zero: float, held: bool) -> None:
    codes, scale = torch.zeros(4, 48, dtype=torch.uint8), torch.ones(48, 1).half()
    points = torch.zeros(48, 1).half()
    points[7] = zero
    matrix = unit_matrix(QTensor(codes, Grid(scale, points, 4, 4, "out")))
    assert (matrix is not None) == held
