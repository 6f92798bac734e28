"""The bytes of the spqr layout, written and read here once more with plain numbers."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.core.spec import QuantSpec
from quantine.errors import FormatError
from quantine.formats import FORMATS
from quantine.formats.foreign.spqr.layout import LARGEST_WIDTH, SPEC, Spqr
from samples import FAITHFUL, FAITHFUL_SPEC, correlated_inputs, observed, quick, random_weight

Tensors = dict[str, Tensor]
both = pytest.mark.parametrize("layout", [Spqr(), Spqr(added=False)])
ADDS, REPLACES = Spqr(), Spqr(added=False)
ROWS, COLUMNS = 32, 48


def half_bits(value: float) -> int:
    return int(struct.unpack("<H", struct.pack("<e", value))[0])


def half_value(bits: int) -> float:
    return float(struct.unpack("<e", struct.pack("<H", bits))[0])


def signed(word: int, bits: int) -> int:
    return word - 2**bits if word >= 2 ** (bits - 1) else word


class Numbers:
    """A matrix in plain numbers, from which the tests build tensors and weights on their own.

    Attributes:
        codes: by row and column; scale_codes, zero_codes: by row and column tile.
        second: ``(ss, zs, sz, zz)`` by row tile and column tile.
        outliers: stored value by row and column.
        order: input of each column.
    """

    def __init__(self, seed: int, rows: int = ROWS, columns: int = COLUMNS) -> None:
        random = np.random.default_rng(seed)
        tiles = columns // 16
        self.shape = (rows, columns)
        self.codes = random.integers(0, 8, (rows, columns)).tolist()
        self.scale_codes = random.integers(0, 8, (rows, tiles)).tolist()
        self.zero_codes = random.integers(0, 8, (rows, tiles)).tolist()
        numbers = random.normal(size=(rows // 16, tiles, 4)) * [0.01, 0.5, 3, 3]
        self.second = numbers.astype(np.float16).tolist()
        places = random.random((rows, columns)) < 0.05
        places[5] = False
        self.outliers = {
            (int(r), int(c)): float(np.float16(random.normal() * 0.3))
            for r, c in zip(*places.nonzero(), strict=True)
        }
        self.order = random.permutation(columns).tolist()

    def words(self) -> list[int]:
        """``dense_weights``: one word for each row of each tile."""
        rows, columns = self.shape
        words = []
        for row_tile in range(rows // 16):
            for tile in range(columns // 16):
                second = sum(
                    half_bits(value) << 16 * i
                    for i, value in enumerate(self.second[row_tile][tile])
                )
                for k in range(16):
                    row = row_tile * 16 + k
                    word = self.scale_codes[row][tile] | self.zero_codes[row][tile] << 3
                    for i in range(16):
                        word |= self.codes[row][tile * 16 + i] << (6 + 3 * i)
                    words.append(word | (second >> 8 * (k // 2) & 255) << 54)
        return words

    def rows_of_entries(self) -> list[list[int]]:
        """Words of ``col_vals``, row by row."""
        found: list[list[int]] = [[] for _ in range(self.shape[0])]
        for (row, column), value in sorted(self.outliers.items()):
            found[row].append(signed(half_bits(value) << 16 | column, 32))
        return found

    def csr(self) -> Tensors:
        rows = self.rows_of_entries()
        offsets = [sum(map(len, rows[:r])) for r in range(len(rows) + 1)]
        return self._tensors(offsets, [word for row in rows for word in row])

    def ptcsr(self) -> Tensors:
        rows = self.rows_of_entries()
        offsets, words = [0], []
        for start in range(0, len(rows), 16):
            tile = rows[start : start + 16]
            for k in range(max(map(len, tile))):
                words.extend(row[k] if k < len(row) else 0 for row in tile)
            offsets.append(len(words))
        return self._tensors(offsets, words)

    def _tensors(self, offsets: list[int], col_vals: list[int]) -> Tensors:
        pairs = zip(self.order[::2], self.order[1::2], strict=True)
        return {
            "dense_weights": torch.tensor(self.words(), dtype=torch.int64),
            "row_offsets": torch.tensor(offsets, dtype=torch.int32),
            "col_vals": torch.tensor(col_vals, dtype=torch.int32),
            "in_perm": torch.tensor([a | b << 16 for a, b in pairs], dtype=torch.int32),
        }


def read_words(
    tensors: Tensors, shape: tuple[int, int], kind: type[np.floating]
) -> tuple[np.ndarray, dict[tuple[int, int], float]]:
    """Decoded codes in stored order, and stored values, as the kernel finds them.

    Args:
        kind: float type of every step: the kernel's is float16, a `Grid`'s float32.
    """
    rows, columns = shape
    decoded = np.zeros(shape, kind)
    words = [word % 2**64 for word in tensors["dense_weights"].tolist()]
    for tile in range(len(words) // 16):
        part = words[tile * 16 : tile * 16 + 16]
        bits = 0
        for k, word in enumerate(part):  # the kernel ORs both copies of each byte
            bits |= (word >> 54) << 8 * (k // 2)
        ss, zs, sz, zz = (kind(half_value(bits >> 16 * i & 0xFFFF)) for i in range(4))
        row, column = tile // (columns // 16) * 16, tile % (columns // 16) * 16
        for k, word in enumerate(part):
            scale = ss * (kind(word & 7) - sz)
            zero = zs * (kind(word >> 3 & 7) - zz)
            for i in range(16):
                decoded[row + k, column + i] = scale * (kind(word >> (6 + 3 * i) & 7) - zero)
    offsets, kept = tensors["row_offsets"].tolist(), {}
    for r in range(len(offsets) - 1):
        for j in range(offsets[r], offsets[r + 1]):
            word = int(tensors["col_vals"][j]) % 2**32
            row = r if len(offsets) == rows + 1 else r * 16 + j % 16
            if word:
                kept[row, word & 0xFFFF] = half_value(word >> 16)
    return decoded, kept


def in_input_order(stored: np.ndarray, order: Sequence[int]) -> np.ndarray:
    weight = np.empty_like(stored)
    for column, source in enumerate(order):
        weight[:, source] = stored[:, column]
    return weight


def kernel_weight(tensors: Tensors, numbers: Numbers, kind: type[np.floating]) -> np.ndarray:
    """What the authors' kernel multiplies with: decoded codes plus stored values."""
    decoded, kept = read_words(tensors, numbers.shape, kind)
    weight = decoded.astype(np.float32)
    for place, value in kept.items():
        weight[place] += np.float32(value)
    return in_input_order(weight, numbers.order)


def same_bits(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["csr", "ptcsr"])
def test_a_checkpoint_of_ours_means_what_the_kernel_computes(seed: int, kind: str) -> None:
    numbers = Numbers(seed)
    tensors: Tensors = getattr(numbers, kind)()
    found = ADDS.unpack(tensors, SPEC, COLUMNS).dequantize().numpy()
    assert np.array_equal(found, kernel_weight(tensors, numbers, np.float32))
    # The kernel decodes in float16, twice: not equal, but no other meaning.
    coarse = kernel_weight(tensors, numbers, np.float16)
    assert np.abs(found - coarse).max() < 4e-3 * np.abs(found).max()


@pytest.mark.parametrize("kind", ["csr", "ptcsr"])
def test_a_checkpoint_of_the_authors_has_its_outliers_in_place_of_codes(kind: str) -> None:
    numbers = Numbers(0)
    tensors: Tensors = getattr(numbers, kind)()
    weight, kept = read_words(tensors, numbers.shape, np.float32)
    for place, value in kept.items():
        weight[place] = value
    found = REPLACES.unpack(tensors, SPEC, COLUMNS).dequantize().numpy()
    assert np.array_equal(found, in_input_order(weight, numbers.order))
    assert not np.array_equal(found, kernel_weight(tensors, numbers, np.float32))


@both
@pytest.mark.parametrize("seed", range(3))
def test_packing_gives_the_written_tensors(layout: Spqr, seed: int) -> None:
    numbers = Numbers(seed)
    assert same_bits(layout.pack(layout.unpack(numbers.csr(), SPEC, COLUMNS)), numbers.csr())
    again = layout.pack(layout.unpack(numbers.ptcsr(), SPEC, COLUMNS))
    assert same_bits(again, numbers.csr())


def test_golden_words() -> None:
    # One tile, written out. Row 0: scale code 1, zero code 2, weights 0 1 .. 7 0 1 .. 7.
    numbers = Numbers(0, 16, 16)
    numbers.scale_codes[0], numbers.zero_codes[0] = [1], [2]
    numbers.codes[0] = [*range(8), *range(8)]
    numbers.second[0][0] = [1.5, 2.0, -1.0, 0.5]  # 0x3E00, 0x4000, 0xBC00, 0x3800
    numbers.outliers = {(0, 3): 0.25, (2, 15): -2.0}  # 0x3400, 0xC000
    numbers.order = list(range(15, -1, -1))
    tensors = ADDS.pack(ADDS.unpack(numbers.csr(), SPEC, 16))
    weights = 0xFAC688 | 0xFAC688 << 24  # 0 1 .. 7 in 24 bits, twice
    assert tensors["dense_weights"][0] == 1 | 2 << 3 | weights << 6
    seconds = [int(w) >> 54 for w in tensors["dense_weights"]]
    assert bytes(seconds) == bytes.fromhex("0000 3e3e 0000 4040 0000 bcbc 0000 3838")
    assert tensors["row_offsets"].tolist() == [0, 1, 1, *[2] * 14]
    assert tensors["col_vals"].tolist() == [0x34000003, 0xC000000F - 2**32]
    assert tensors["in_perm"].tolist() == [
        15 | 14 << 16,
        13 | 12 << 16,
        11 | 10 << 16,
        9 | 8 << 16,
        7 | 6 << 16,
        5 | 4 << 16,
        3 | 2 << 16,
        1,
    ]
    first = ADDS.unpack(tensors, SPEC, 16)
    # scale 1.5 * (1 + 1) = 3, zero 2 * (2 - 0.5) = 3: weights 3 * (code - 3), reversed.
    expected = [3.0 * (code - 3) for code in numbers.codes[0]]
    expected[3] += 0.25
    assert first.dequantize()[0].tolist() == expected[::-1]


@both
def test_an_empty_order_is_the_identity(layout: Spqr) -> None:
    numbers = Numbers(1)
    plain = numbers.csr() | {"in_perm": torch.empty(0, dtype=torch.int32)}
    unpacked = layout.unpack(plain, SPEC, COLUMNS)
    assert unpacked.in_perm is None
    ordered = layout.unpack(numbers.csr(), SPEC, COLUMNS).dequantize()
    assert torch.equal(unpacked.dequantize(), ordered[:, numbers.order])
    assert same_bits(layout.pack(unpacked), plain)


@both
def test_without_outliers_nothing_is_kept(layout: Spqr) -> None:
    numbers = Numbers(2)
    numbers.outliers = {}
    unpacked = layout.unpack(numbers.csr(), SPEC, COLUMNS)
    assert unpacked.outliers is None
    assert same_bits(layout.pack(unpacked), numbers.csr())
    # The authors' converter writes an empty float tensor.
    floats = numbers.csr() | {"col_vals": torch.zeros(0)}
    assert layout.unpack(floats, SPEC, COLUMNS).outliers is None


@both
def test_chosen_rows_are_those_of_the_whole(layout: Spqr) -> None:
    rows = torch.tensor([31, 0, 7, 7])
    whole = layout.unpack(Numbers(3).csr(), SPEC, COLUMNS).dequantize()
    part = layout.unpack(Numbers(3).csr(), SPEC, COLUMNS, rows)
    assert torch.equal(part.dequantize(), whole[rows])


@quick
@given(
    weight=st.floats(2.0**-12, 0.45),
    stored=st.floats(-60000, 60000, width=16),
)
def test_added_values_come_back_bit_for_bit(weight: float, stored: float) -> None:
    numbers = Numbers(0, 16, 16)
    numbers.second[0][0] = [weight, 1.0, -1.0, 0.0]
    numbers.scale_codes[0], numbers.zero_codes[0] = [0], [0]
    numbers.codes[0] = [1] * 16
    numbers.outliers = {(0, 5): stored + 0.0}
    tensors = numbers.csr()
    assert same_bits(ADDS.pack(ADDS.unpack(tensors, SPEC, 16)), tensors)


def test_an_outlier_is_kept_up_to_the_rounding_of_its_difference() -> None:
    weight, hessian = random_weight(48, 64), observed(correlated_inputs(64, 200))
    solved = FAITHFUL(weight, hessian, FAITHFUL_SPEC)
    assert solved.outliers is not None
    assert solved.outliers.entries > 5
    stored = ADDS.unpack(ADDS.pack(solved), SPEC, 64)
    assert torch.equal(stored.codes, solved.codes)
    assert torch.equal(stored.grid.scales(), solved.grid.scales())
    assert torch.equal(stored.grid.zeros(), solved.grid.zeros())
    exact, found = solved.dequantize(), stored.dequantize()
    changed = (exact != found).nonzero()
    assert 0 < len(changed) <= solved.outliers.entries
    assert torch.allclose(found, exact, rtol=0, atol=2.0**-11 * float(weight.abs().max()))
    # What is stored stays as it is, however often it is read and written.
    assert same_bits(ADDS.pack(stored), ADDS.pack(solved))
    assert REPLACES.unpack(REPLACES.pack(solved), SPEC, 64).dequantize().equal(exact)


def test_size_by_hand() -> None:
    assert SPEC == FAITHFUL_SPEC
    assert ADDS.nbytes(SPEC, 32, 48, False) == 96 * 8 + 33 * 4
    assert ADDS.nbytes(SPEC, 32, 48, True) == 96 * 8 + 33 * 4 + 24 * 4
    assert ADDS.nbytes(SPEC, 32, 48, True, 0.125) == 96 * 8 + 33 * 4 + 24 * 4 + 192 * 4
    tensors = Numbers(0).csr()
    share = len(tensors["col_vals"]) / (32 * 48)
    assert ADDS.nbytes(SPEC, 32, 48, True, share) == sum(t.nbytes for t in tensors.values())


def test_only_one_spec_is_supported_and_only_one_meaning_is_written() -> None:
    fields = {"bits": 4, "group_size": 32, "scale_bits": 16, "zero_bits": 0, "stat_group_size": 32}
    assert ADDS.supports(SPEC, True)
    assert ADDS.supports(SPEC, False)
    for name, value in fields.items():
        other = QuantSpec(**{**vars(SPEC), name: value})
        assert not ADDS.supports(other, False)
        with pytest.raises(FormatError, match=name):
            ADDS.unpack(Numbers(0).csr(), other, COLUMNS)
    assert ADDS.writable
    assert not REPLACES.writable
    assert list(FORMATS).index("spqr") > list(FORMATS).index("sparse")


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((40, 48), "16 does not divide 40 outputs.*format sparse"),
        ((48, 40), "16 does not divide 40 inputs.*keep"),
        ((16, 32768), "room for 32767 inputs, not 32768"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, int], said: str) -> None:
    reason = ADDS.refusal(SPEC, *shape)
    assert reason is not None
    with pytest.raises(FormatError, match=said) as refused:
        ADDS.pack(QTensor(torch.zeros(shape, dtype=torch.uint8), Grid(torch.ones(1), None, 3, 16)))
    assert reason in str(refused.value)
    assert ADDS.refusal(SPEC, 16, LARGEST_WIDTH - 15) is None
    assert FORMATS["dense"].refusal(SPEC, *shape) is None
    assert FORMATS["sparse"].refusal(SPEC, *shape) is None


def test_the_widest_matrix_keeps_its_columns_apart() -> None:
    numbers = Numbers(0, 16, 32752)
    numbers.outliers = {(3, 32751): 0.5, (3, 0): -0.5, (15, 32751): 1.0}
    tensors = numbers.csr()
    unpacked = ADDS.unpack(tensors, SPEC, 32752)
    assert unpacked.outliers is not None
    assert unpacked.outliers.columns.tolist() == [0, 32751, 32751]
    assert unpacked.in_perm is not None
    assert unpacked.in_perm.tolist() == numbers.order
    assert same_bits(ADDS.pack(unpacked), tensors)


def test_other_grids_and_far_outliers_are_refused() -> None:
    good = ADDS.unpack(Numbers(0).csr(), SPEC, COLUMNS)
    scale = good.grid.scale
    assert isinstance(scale, Statistic)
    halves = torch.ones(ROWS, COLUMNS // 16).half()
    for grid in (
        Grid(halves, good.grid.zero_point, 3, 16),
        Grid(scale, halves, 3, 16),
        Grid(scale, None, 3, 16),
        Grid(scale, good.grid.zero_point, 4, 16),
        Grid(Statistic(scale.codes, Grid(scale.grid.scale, None, 4, 16)), scale, 3, 16),
        Grid(Statistic(scale.codes, Grid(scale.grid.scale, None, 3, 32)), scale, 3, 16),
    ):
        with pytest.raises(FormatError, match=r"holds only QuantSpec.*use sparse"):
            ADDS.pack(QTensor(good.codes, grid))
    mask = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    mask[1, 1] = True
    far = Csr(*vars(Csr.where(mask, torch.zeros(ROWS, COLUMNS))).values())
    far = Csr(far.row_offsets, far.columns, torch.tensor([1e6]), far.shape)
    with pytest.raises(FormatError, match="away from its decoded code"):
        ADDS.pack(QTensor(good.codes, good.grid, None, far))


def test_sparse_refuses_outliers_that_float16_does_not_hold() -> None:
    summed = ADDS.unpack(Numbers(0).csr(), SPEC, COLUMNS)
    with pytest.raises(FormatError, match="outliers in float16 only"):
        FORMATS["sparse"].pack(summed)
    plain = REPLACES.unpack(Numbers(0).csr(), SPEC, COLUMNS)
    moved = FORMATS["sparse"].unpack(FORMATS["sparse"].pack(plain), SPEC, COLUMNS)
    assert torch.equal(moved.dequantize(), plain.dequantize())


@both
@pytest.mark.parametrize("key", Spqr().tensor_names)
def test_missing_and_misshapen_tensors_are_refused(layout: Spqr, key: str) -> None:
    tensors = Numbers(0).csr()
    for broken in (
        {name: tensor for name, tensor in tensors.items() if name != key},
        {**tensors, key: tensors[key].to(torch.int16)},
        {**tensors, key: tensors[key].unsqueeze(0)},
        {**tensors, key: tensors[key][:-1]},
    ):
        with pytest.raises(FormatError, match=key):
            layout.unpack(broken, SPEC, COLUMNS)
    with pytest.raises(FormatError, match="surprise"):
        layout.unpack({**tensors, "surprise": torch.zeros(1)}, SPEC, COLUMNS)
    with pytest.raises(FormatError):
        layout.unpack(tensors, SPEC, COLUMNS + 16)


def _set(key: str, index: int, value: int) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        tensors[key][index] = value

    return damage


def _swap(tensors: Tensors) -> None:
    offsets = tensors["row_offsets"]
    start = int(offsets[int((offsets.diff() > 1).nonzero()[0])])
    tensors["col_vals"][[start, start + 1]] = tensors["col_vals"][[start + 1, start]]


@pytest.mark.parametrize(
    ("key", "damage"),
    [
        ("dense_weights", _set("dense_weights", 0, 2**62)),
        ("dense_weights", _set("dense_weights", 0, -1)),
        ("row_offsets", _set("row_offsets", 0, 1)),
        ("row_offsets", _set("row_offsets", 1, 10**6)),
        ("row_offsets", _set("row_offsets", -1, 0)),
        ("row_offsets", _set("row_offsets", 3, -5)),
        ("col_vals", _set("col_vals", 0, COLUMNS)),
        ("col_vals", _set("col_vals", 0, 0xFFFF)),
        ("col_vals", _set("col_vals", 0, 0x7C000000)),
        ("col_vals", _swap),
        ("in_perm", _set("in_perm", 0, 0)),
        ("in_perm", _set("in_perm", 0, -1)),
    ],
)
def test_damaged_tensors_are_refused(key: str, damage: Callable[[Tensors], None]) -> None:
    tensors = Numbers(4).csr()
    damage(tensors)
    for layout in (ADDS, REPLACES):
        with pytest.raises(FormatError, match=key):
            layout.unpack(tensors, SPEC, COLUMNS)


def test_damaged_tiles_and_second_levels_are_refused() -> None:
    padded = Numbers(4).ptcsr()
    padded["row_offsets"][1] -= 1
    with pytest.raises(FormatError, match="row_offsets"):
        ADDS.unpack(padded, SPEC, COLUMNS)
    copies = Numbers(4).csr()
    copies["dense_weights"][1] ^= 1 << 54  # rows 0 and 1 carry the same byte
    with pytest.raises(FormatError, match="copies"):
        ADDS.unpack(copies, SPEC, COLUMNS)
    infinite = Numbers(4)
    infinite.second[0][0][2] = float("inf")
    with pytest.raises(FormatError, match="not finite"):
        ADDS.unpack(infinite.csr(), SPEC, COLUMNS)


@pytest.mark.parametrize("kind", ["csr", "ptcsr"])
def test_nothing_is_made_on_another_device_than_the_tensors(kind: str) -> None:
    # A factory that ignores its arguments' device makes a meta tensor here, and mixing fails.
    tensors: Tensors = getattr(Numbers(0), kind)()
    with torch.device("meta"):
        weight = ADDS.unpack(tensors, SPEC, COLUMNS).dequantize()
    assert torch.equal(weight, ADDS.unpack(tensors, SPEC, COLUMNS).dequantize())


@pytest.mark.parametrize("power", [-12, -30, -100])
def test_weights_too_small_for_float16_steps_are_refused_with_the_remedy(power: int) -> None:
    solved = FAITHFUL(random_weight(32, 48), observed(correlated_inputs(48, 80)), FAITHFUL_SPEC)
    small = replace(solved, grid=replace(solved.grid, exponent=power), outliers=None)
    with pytest.raises(FormatError, match=r"its weights are so small .*%: use sparse"):
        Spqr().pack(small)


def test_scales_that_float16_steps_hold_need_no_exponent() -> None:
    solved = FAITHFUL(random_weight(32, 48), observed(correlated_inputs(48, 80)), FAITHFUL_SPEC)
    small = replace(solved, grid=replace(solved.grid, exponent=-3), outliers=None)
    held = Spqr().unpack(Spqr().pack(small), FAITHFUL_SPEC, 48)
    assert held.grid.exponent == 0
    torch.testing.assert_close(held.dequantize(), small.dequantize(), rtol=1e-3, atol=1e-6)
