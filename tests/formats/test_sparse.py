"""The bytes of the sparse layout, written out: files of today must open for ever."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.core.spec import QuantSpec
from quantine.errors import FormatError
from quantine.formats.sparse import Sparse

# Two bits, three rows of four columns, groups of two; scales of 3 bits and zero points of 2 bits,
# in runs of two outputs, of which the last is shorter. Everything is [group, ...] but codes.
SPEC = QuantSpec(2, 2, scale_bits=3, zero_bits=2, stat_group_size=2)
GOLDEN = {
    # 0 1 2 3 | 3 3 0 1 | 2 0 1 3: each row is one byte, such as 0 + 1 * 4 + 2 * 16 + 3 * 64.
    "codes": (torch.uint8, (3, 1), "e4 4f d2"),
    # Group 0 holds 1 7 2: 1 + 7 * 8 + 2 * 64 = 0x00b9. Group 1 holds 0 3 5: 0x0158.
    "scale": (torch.uint8, (2, 2), "b900 5801"),
    # 0.5, 1; 2, 0.25 as little-endian float16.
    "scale_step": (torch.float16, (2, 2), "0038 003c 0040 0034"),
    # -1, 0; -0.5, 1.
    "scale_zero": (torch.float16, (2, 2), "00bc 0000 00b8 003c"),
    # Group 0 holds 0 3 1: 3 * 4 + 1 * 16. Group 1 holds 2 1 0: 2 + 1 * 4.
    "zero": (torch.uint8, (2, 1), "1c 06"),
    # 1, 0.5; 0.5, 1.
    "zero_step": (torch.float16, (2, 2), "003c 0038 0038 003c"),
    # 0, 0; 1, -0.5.
    "zero_zero": (torch.float16, (2, 2), "0000 0000 003c 00b8"),
    # Three inliers, then an outlier; four, and one; none, and one.
    "outlier_gap": (torch.uint8, (3,), "03 04 00"),
    # -8, 0.5, 1000.
    "outlier_value": (torch.float16, (3,), "00c8 0038 d063"),
    # Stored column j belongs to input 2, 0, 3, 1.
    "in_perm": (torch.int16, (4,), "0200 0000 0300 0100"),
}
SCALES = [[1.0, 1.0], [4.0, 7.0], [2.0, 1.0]]
ZEROS = [[0.0, 0.5], [3.0, 0.0], [0.5, 0.5]]
INLIERS = [[0.0, 1.0, 1.5, 2.5], [0.0, 0.0, 0.0, 7.0], [3.0, -1.0, 0.5, 2.5]]
STORED = [[0.0, 1.0, 1.5, -8.0], [0.0, 0.0, 0.0, 7.0], [0.5, 1000.0, 0.5, 2.5]]
WEIGHT = [[1.0, -8.0, 0.0, 1.5], [0.0, 7.0, 0.0, 0.0], [1000.0, 2.5, 0.5, 0.5]]


def tensor(dtype: torch.dtype, shape: tuple[int, ...], digits: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(digits), dtype=dtype).view(shape)


def golden_tensors() -> dict[str, Tensor]:
    return {name: tensor(*described) for name, described in GOLDEN.items()}


def golden_qtensor() -> QTensor:
    def half(values: list[list[float]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float16)

    def codes(values: list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.uint8)

    scale_grid = Grid(half([[0.5, 1.0], [2.0, 0.25]]), half([[-1.0, 0.0], [-0.5, 1.0]]), 3, 2)
    zero_grid = Grid(half([[1.0, 0.5], [0.5, 1.0]]), half([[0.0, 0.0], [1.0, -0.5]]), 2, 2)
    grid = Grid(
        Statistic(codes([[1, 7, 2], [0, 3, 5]]), scale_grid),
        Statistic(codes([[0, 3, 1], [2, 1, 0]]), zero_grid),
        bits=2,
        group_size=2,
    )
    mask = torch.tensor(STORED) != torch.tensor(INLIERS)
    return QTensor(
        codes([[0, 1, 2, 3], [3, 3, 0, 1], [2, 0, 1, 3]]),
        grid,
        torch.tensor([2, 0, 3, 1]),
        Csr.where(mask, torch.tensor(STORED)),
    )


def test_golden_tensors_unpack_to_the_written_values() -> None:
    tensors = golden_tensors()
    unpacked = Sparse().unpack(tensors, SPEC, 4)
    assert unpacked.grid.scales().tolist() == SCALES
    assert unpacked.grid.zeros().tolist() == ZEROS
    assert unpacked.dequantize().tolist() == WEIGHT
    del tensors["in_perm"]
    assert Sparse().unpack(tensors, SPEC, 4).dequantize().tolist() == STORED
    del tensors["outlier_gap"], tensors["outlier_value"]
    assert Sparse().unpack(tensors, SPEC, 4).dequantize().tolist() == INLIERS


def test_packing_gives_the_golden_bytes() -> None:
    packed = Sparse().pack(golden_qtensor())
    assert packed.keys() == GOLDEN.keys()
    for name, (dtype, shape, digits) in GOLDEN.items():
        assert (packed[name].dtype, tuple(packed[name].shape)) == (dtype, shape)
        assert packed[name].numpy().tobytes() == bytes.fromhex(digits), name


def test_without_second_level_and_outliers_it_is_the_dense_layout() -> None:
    # One row: codes 3 and 1 of two bits, scale 0.5, whole zero point 2.
    tensors = {
        "codes": tensor(torch.uint8, (1, 1), "07"),
        "scale": tensor(torch.float16, (1, 1), "0038"),
        "zero": tensor(torch.uint8, (1,), "02"),
    }
    assert Sparse().unpack(tensors, QuantSpec(2, 2), 2).dequantize().tolist() == [[0.5, -0.5]]


def test_fractional_zero_points_in_float16() -> None:
    tensors = {
        "codes": tensor(torch.uint8, (1, 1), "07"),
        "scale": tensor(torch.float16, (1, 1), "0038"),
        "zero": tensor(torch.float16, (1, 1), "00be"),  # -1.5
    }
    spec = QuantSpec(2, 2, zero_bits=16)
    assert Sparse().unpack(tensors, spec, 2).dequantize().tolist() == [[2.25, 1.25]]


@pytest.mark.parametrize("missing", ["outlier_gap", "outlier_value"])
def test_half_of_the_outliers_is_refused(missing: str) -> None:
    tensors = golden_tensors()
    del tensors[missing]
    with pytest.raises(FormatError, match="belong together"):
        Sparse().unpack(tensors, SPEC, 4)


def test_an_outlier_outside_of_the_matrix_is_refused() -> None:
    tensors = golden_tensors()
    tensors["outlier_gap"][2] = 3
    with pytest.raises(FormatError, match="outlier_gap is damaged"):
        Sparse().unpack(tensors, SPEC, 4)


@pytest.mark.parametrize("width", [32_768, 32_769, 70_000])
def test_wide_layers_are_exact(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    order = torch.randperm(width, generator=generator)
    mask = torch.rand(3, width, generator=generator) < 0.001
    mask[:, [0, 32_767, width - 1]] = True
    kept = Csr.where(mask, torch.randn(3, width, generator=generator))
    grid = Grid(torch.ones(3, 1).half(), None, 2, width)
    codes = torch.randint(0, 4, (3, width), generator=generator).to(torch.uint8)
    qtensor = QTensor(codes, grid, order, kept)
    packed = Sparse().pack(qtensor)
    assert packed["in_perm"].dtype == (torch.int16 if width == 32_768 else torch.int32)
    unpacked = Sparse().unpack(packed, QuantSpec(2, -1, sym=True), width)
    assert torch.equal(unpacked.dequantize(), qtensor.dequantize())
    assert unpacked.outliers is not None
    assert torch.equal(unpacked.outliers.columns, kept.columns)


def test_size_by_hand() -> None:
    # 576 columns at 3 bits are 216 bytes; 36 groups of 16 hold, for 100 outputs, 38 bytes of 3-bit
    # codes and 2 + 2 bytes for each of 7 runs, twice: for scales and for zero points.
    spec = QuantSpec(3, 16, scale_bits=3, zero_bits=3, stat_group_size=16)
    fixed = 100 * 216 + 2 * 36 * (38 + 7 * 4)
    assert Sparse().nbytes(spec, 100, 576, False) == fixed
    assert Sparse().nbytes(spec, 100, 576, True) == fixed + 576 * 2
    assert Sparse().nbytes(spec, 100, 40_000, True) == (
        100 * 15_000 + 2 * 2500 * (38 + 28) + 40_000 * 4
    )
    whole = QuantSpec(4, 64, scale_bits=4, stat_group_size=-1)
    assert Sparse().nbytes(whole, 100, 576, False) == 100 * 288 + 9 * (50 + 4) + 100 * 9 // 2
    fractional = QuantSpec(4, 64, zero_bits=16)
    assert Sparse().nbytes(fractional, 100, 576, False) == 100 * 288 + 100 * 9 * (2 + 2)


@pytest.mark.parametrize("share", [0.0002, 0.002, 0.01, 0.05, 0.5])
def test_outliers_cost_at_most_four_bytes_and_about_what_is_predicted(share: float) -> None:
    rows, columns, spec = 300, 576, QuantSpec(2, -1, sym=True)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(rows, columns, generator=generator) < share
    kept = Csr.where(mask, torch.randn(rows, columns, generator=generator))
    grid = Grid(torch.ones(rows, 1).half(), None, 2, columns)
    packed = Sparse().pack(QTensor(torch.zeros(rows, columns, dtype=torch.uint8), grid, None, kept))
    codes_and_scales = rows * columns // 4 + rows * 2
    size = sum(one.nbytes for one in packed.values())
    assert size <= codes_and_scales + 4 * kept.entries + 4 * (rows + 1)
    predicted = Sparse().nbytes(spec, rows, columns, False, kept.entries / mask.numel())
    if share >= 0.01:
        assert size == pytest.approx(predicted, rel=0.01)


def test_golden_bytes_along_outputs() -> None:
    # Docs/format.md: four outputs in groups of two, three inputs, whose statistics share grids.
    tensors = golden_tensors()
    del tensors["in_perm"]
    tensors["codes"] = tensor(torch.uint8, (4, 1), "240d1233")
    tensors["outlier_gap"] = tensor(torch.uint8, (1,), "0b")
    tensors["outlier_value"] = torch.tensor([9.0], dtype=torch.float16)
    spec = replace(SPEC, group_axis="out")
    unpacked = Sparse().unpack(tensors, spec, 3)
    expected = [[0, -8, 3], [1, 0, -1], [1.5, 0, 0.5], [2.5, 0, 9]]
    assert unpacked.dequantize().tolist() == expected
    packed = Sparse().pack(unpacked)
    assert packed.keys() == tensors.keys()
    assert all(torch.equal(packed[key], tensors[key]) for key in tensors)
