"""The bytes of the dense layout, written out: files of today must open for ever."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantine.core.grid import Grid
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.errors import FormatError
from quantine.formats.layout import LARGEST_INT16_INDEX
from quantine.formats.sparse import Sparse
from quantine.methods.rtn import RTN

# Three bits, two rows of ten columns, groups of five, asymmetric.
# Row 0 holds 0 1 2 3 4 5 6 7 1 2: the first eight codes are 0xFAC688, then 1 + 2 * 8 = 0x11.
# Row 1 holds ten sevens: thirty bits that are one, two that are zero.
CODES = "88c6fa11 ffffff3f"
# 0.5, 1.0; 2.0, 0.25 as little-endian float16.
SCALE = "0038 003c 0040 0034"
# 0, 1; 7, 4 as one stream of twelve bits: 0 + 1 * 8 + 7 * 64 + 4 * 512 = 0x09c8.
ZERO = "c809"
# Stored column j belongs to input 9 - j; int16.
ORDER = "0900 0800 0700 0600 0500 0400 0300 0200 0100 0000"

HEADER = (
    b'{"codes":{"dtype":"U8","shape":[2,4],"data_offsets":[28,36]},'
    b'"scale":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]},'
    b'"in_perm":{"dtype":"I16","shape":[10],"data_offsets":[8,28]},'
    b'"zero":{"dtype":"U8","shape":[2],"data_offsets":[36,38]}}'
)
FILE = (
    struct.pack("<Q", len(HEADER))
    + HEADER
    + b"".join(map(bytes.fromhex, (SCALE, ORDER, CODES, ZERO)))
)
DENSE = Sparse(plain=True)
SPEC = QuantSpec(bits=3, group_size=5)
STORED = [
    # scale 0.5, zero 0 | scale 1, zero 1
    [0.0, 0.5, 1.0, 1.5, 2.0, 4.0, 5.0, 6.0, 0.0, 1.0],
    # scale 2, zero 7 | scale 0.25, zero 4
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.75, 0.75, 0.75, 0.75, 0.75],
]


def golden_tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    path = tmp_path / "golden.safetensors"
    path.write_bytes(FILE)
    return load_file(path)


def test_golden_file_unpacks_to_the_written_values(tmp_path: Path) -> None:
    tensors = golden_tensors(tmp_path)
    unpacked = DENSE.unpack(tensors, SPEC, 10)
    assert unpacked.dequantize().tolist() == [row[::-1] for row in STORED]
    del tensors["in_perm"]
    assert DENSE.unpack(tensors, SPEC, 10).dequantize().tolist() == STORED


def test_packing_gives_the_golden_bytes(tmp_path: Path) -> None:
    qtensor = QTensor(
        torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 1, 2], [7] * 10], dtype=torch.uint8),
        Grid(
            torch.tensor([[0.5, 1.0], [2.0, 0.25]], dtype=torch.float16),
            torch.tensor([[0, 1], [7, 4]], dtype=torch.uint8),
            bits=3,
            group_size=5,
        ),
        torch.arange(9, -1, -1),
    )
    packed = {key: tensor.numpy().tobytes() for key, tensor in DENSE.pack(qtensor).items()}
    assert packed == {
        "codes": bytes.fromhex(CODES),
        "scale": bytes.fromhex(SCALE),
        "zero": bytes.fromhex(ZERO),
        "in_perm": bytes.fromhex(ORDER),
    }


def test_symmetric_golden_bytes() -> None:
    # Four bits, one row: codes 1, 15, 8 around the middle code 8, which no file stores.
    tensors = {
        "codes": torch.tensor([[0xF1, 0x08]], dtype=torch.uint8),
        "scale": torch.tensor([[0.5]], dtype=torch.float16),
    }
    unpacked = DENSE.unpack(tensors, QuantSpec(4, -1, sym=True), 3)
    assert unpacked.dequantize().tolist() == [[-3.5, 3.5, 0.0]]
    assert unpacked.grid.zero_point is None


def test_zero_points_of_all_rows_form_one_stream() -> None:
    # Three rows with one group each and two bits: 1 + 2 * 4 + 3 * 16 = 57, in a single byte.
    grid = Grid(torch.ones(3, 1).half(), torch.tensor([[1], [2], [3]], dtype=torch.uint8), 2, 4)
    qtensor = QTensor(torch.zeros(3, 4, dtype=torch.uint8), grid)
    assert DENSE.pack(qtensor)["zero"].tolist() == [57]


def test_wide_layers_need_wide_indices() -> None:
    for width, dtype in (
        (LARGEST_INT16_INDEX, torch.int16),
        (LARGEST_INT16_INDEX + 1, torch.int32),
    ):
        grid = Grid(torch.ones(1, 1).half(), None, 2, width)
        order = torch.arange(width).flip(0)
        qtensor = QTensor(torch.zeros(1, width, dtype=torch.uint8), grid, order)
        packed = DENSE.pack(qtensor)
        assert packed["in_perm"].dtype == dtype
        unpacked = DENSE.unpack(packed, QuantSpec(2, -1, sym=True), width)
        assert unpacked.in_perm is not None
        assert torch.equal(unpacked.in_perm, order)


def test_size_by_hand() -> None:
    # 576 columns at 3 bits are 216 bytes; 9 groups of 64 hold 2 bytes of scale and 3 bits of zero.
    spec = QuantSpec(3, 64)
    assert DENSE.nbytes(spec, 100, 576, False) == 100 * 216 + 100 * 9 * 2 + (100 * 9 * 3 + 7) // 8
    assert DENSE.nbytes(spec, 100, 576, True) == DENSE.nbytes(spec, 100, 576, False) + 576 * 2
    assert DENSE.nbytes(QuantSpec(8, -1, sym=True), 3, 10, False) == 3 * 10 + 3 * 2


@pytest.mark.parametrize("damage", [0, -1, 8])
def test_damaged_order_is_refused(damage: int) -> None:
    spec = QuantSpec(4, 4)
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    grid = RTN()(torch.randn(2, 8), None, spec).grid
    packed = DENSE.pack(QTensor(torch.zeros(2, 8, dtype=torch.uint8), grid, order))
    packed["in_perm"][3] = damage
    with pytest.raises(FormatError, match="in_perm"):
        DENSE.unpack(packed, spec, 8)


def test_golden_bytes_along_outputs() -> None:
    # Docs/format.md: three outputs in one group, two inputs, two bits.
    spec = QuantSpec(2, 3, group_axis="out")
    tensors = {
        "codes": torch.tensor([[0x1], [0x6], [0xB]], dtype=torch.uint8),
        "scale": torch.tensor([[0.5], [2.0]], dtype=torch.float16),
        "zero": torch.tensor([0x06], dtype=torch.uint8),
    }
    unpacked = DENSE.unpack(tensors, spec, 2)
    assert unpacked.dequantize().tolist() == [[-0.5, -2.0], [0.0, 0.0], [0.5, 2.0]]
    packed = DENSE.pack(unpacked)
    assert packed.keys() == tensors.keys()
    assert all(torch.equal(packed[key], tensors[key]) for key in tensors)


def test_an_exponent_multiplies_scales() -> None:
    tensors = {
        "codes": torch.tensor([[0xE4], [0x1B]], dtype=torch.uint8),  # 0 1 2 3 | 3 2 1 0
        "scale": torch.tensor([[0.5], [3.0]], dtype=torch.float16),
        "exponent": torch.tensor([-40], dtype=torch.int8),
    }
    spec = QuantSpec(2, -1, sym=True)
    qtensor = Sparse(plain=True).unpack(tensors, spec, 4)
    expected = [[-1.0, -0.5, 0.0, 0.5], [3.0, 0.0, -3.0, -6.0]]
    assert (qtensor.dequantize() * 2.0**40).tolist() == expected
    packed = Sparse(plain=True).pack(qtensor)
    assert packed.keys() == tensors.keys()
    assert all(torch.equal(packed[name], tensors[name]) for name in tensors)
    for damaged in (torch.tensor([-40.0]), torch.tensor([-40, 1], dtype=torch.int8)):
        with pytest.raises(FormatError, match="exponent"):
            Sparse(plain=True).unpack({**tensors, "exponent": damaged}, spec, 4)
