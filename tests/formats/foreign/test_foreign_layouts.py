"""The bytes of other engines' layouts, against slow readers written from their descriptions."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.errors import FormatError
from quantine.formats.foreign.awq.read import unpack_matrix as unpack_awq
from quantine.formats.foreign.compressed_tensors.layout import pack_matrix as pack_ct
from quantine.formats.foreign.compressed_tensors.layout import unpack_matrix as unpack_ct
from quantine.formats.foreign.gguf.blocks import TYPES, fitting
from quantine.formats.foreign.gptq.layout import pack_matrix as pack_gptq
from quantine.formats.foreign.gptq.layout import unpack_matrix as unpack_gptq
from quantine.formats.foreign.gptq.settings import settings_of
from quantine.formats.foreign.plain import Plain, plain, qtensor_of

ROWS, COLUMNS = 40, 192


def random_plain(
    bits: int, group: int = 64, *, sym: bool = False, least: int = 0, seed: int = 0
) -> Plain:
    """A matrix with every code, scales of all sizes, and zero points of at least ``least``."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (ROWS, COLUMNS), generator=generator, dtype=torch.uint8)
    groups = COLUMNS // group
    scale = torch.rand(ROWS, groups, generator=generator).mul(10).sub(9).exp().half()
    zero = torch.randint(least, 2**bits, (ROWS, groups), generator=generator, dtype=torch.uint8)
    if sym:
        zero.fill_(2 ** (bits - 1))
    return Plain(codes, scale, zero, bits)


def decoded(matrix: Plain) -> Tensor:
    """The weights of a matrix, as the description has them."""
    scale, zero = matrix.by_weight()
    return scale.float() * (matrix.codes.float() - zero.float())


def stream(words: list[int], bits: int, count: int) -> list[int]:
    """Codes of one unbroken stream in words of 32 bits, the lowest bit first."""
    whole = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return [whole >> (bits * place) & (2**bits - 1) for place in range(count)]


def equal(one: Plain, two: Plain) -> bool:
    same = all(
        torch.equal(getattr(one, key), getattr(two, key)) for key in ("codes", "scale", "zero")
    )
    if one.group_of is None or two.group_of is None:
        return same and one.group_of is two.group_of
    return same and torch.equal(one.group_of, two.group_of)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, version: int) -> None:
    matrix = random_plain(bits, least=1 if version == 1 else 0)
    tensors = pack_gptq(matrix, version, ordered=False)
    codes = [stream(column.tolist(), bits, COLUMNS) for column in tensors["qweight"].T]
    zeros = [stream(row.tolist(), bits, ROWS) for row in tensors["qzeros"]]
    q, z = torch.tensor(codes), torch.tensor(zeros).T + (1 if version == 1 else 0)
    weights = tensors["scales"].T.float().repeat_interleave(64, 1) * (
        q - z.repeat_interleave(64, 1)
    )
    assert torch.equal(weights, decoded(matrix))
    assert "g_idx" not in tensors
    assert equal(
        unpack_gptq("l", tensors, bits, version, (ROWS, COLUMNS), 64, ordered=False), matrix
    )


def test_symmetric_zeros_of_gptq_are_the_well_known_words() -> None:
    matrix = random_plain(4, sym=True)
    assert bool((pack_gptq(matrix, 1, ordered=False)["qzeros"] == 0x77777777).all())
    version2 = pack_gptq(matrix, 2, ordered=False)["qzeros"]
    assert bool(((version2.long() & 0xFFFFFFFF) == 0x88888888).all())


def test_an_order_of_columns_becomes_g_idx() -> None:
    matrix = random_plain(4)
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))
    qtensor = QTensor(matrix.codes, Grid(matrix.scale, matrix.zero, 4, 64), order)
    found = plain("l", qtensor)
    assert torch.equal(decoded(found), qtensor.dequantize())
    tensors = pack_gptq(found, 2, ordered=True)
    back = unpack_gptq("l", tensors, 4, 2, (ROWS, COLUMNS), 64, ordered=True)
    assert equal(back, found)
    assert torch.equal(qtensor_of("l", back, sym=False).dequantize(), qtensor.dequantize())


def test_where_one_matrix_has_an_order_all_have_g_idx() -> None:
    matrix = random_plain(4)
    tensors = pack_gptq(matrix, 2, ordered=True)
    assert torch.equal(tensors["g_idx"], torch.arange(COLUMNS, dtype=torch.int32) // 64)
    shape = (ROWS, COLUMNS)
    assert equal(unpack_gptq("l", tensors, 4, 2, shape, 64, ordered=True), matrix)
    del tensors["g_idx"]  # whose groups would be read as consecutive
    with pytest.raises(FormatError, match=r"l\.g_idx is missing"):
        unpack_gptq("l", tensors, 4, 2, shape, 64, ordered=True)


def test_symmetric_compressed_tensors_may_not_have_other_zero_points() -> None:
    matrix = random_plain(4)
    tensors = pack_ct(matrix, False)
    spec = QuantSpec(4, 64, sym=True)
    found = unpack_ct("l", tensors, spec, (ROWS, COLUMNS))
    assert torch.equal(found.zero, matrix.zero)  # which who reads it refuses
    tensors["weight_zero_point"] = torch.zeros(ROWS, 2, dtype=torch.int8)
    assert bool((unpack_ct("l", tensors, spec, (ROWS, COLUMNS)).zero == 8).all())


def test_whole_rows_need_no_g_idx() -> None:
    matrix = random_plain(4, COLUMNS)
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))
    qtensor = QTensor(matrix.codes, Grid(matrix.scale, matrix.zero, 4, COLUMNS), order)
    found = plain("l", qtensor)
    assert found.group_of is None
    assert torch.equal(decoded(found), qtensor.dequantize())


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors(bits: int, sym: bool) -> None:
    matrix = random_plain(bits, sym=sym)
    tensors = pack_ct(matrix, sym)
    codes = [stream(row.tolist(), bits, COLUMNS) for row in tensors["weight_packed"]]
    assert torch.equal(torch.tensor(codes, dtype=torch.uint8), matrix.codes)
    assert ("weight_zero_point" in tensors) != sym
    if not sym:
        zeros = [stream(column.tolist(), bits, ROWS) for column in tensors["weight_zero_point"].T]
        assert torch.equal(torch.tensor(zeros, dtype=torch.uint8).T, matrix.zero)
    assert tensors["weight_shape"].tolist() == [ROWS, COLUMNS]
    spec = QuantSpec(bits, 64, sym)
    assert equal(unpack_ct("l", tensors, spec, (ROWS, COLUMNS)), matrix)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_compressed_tensors_before_june_2026_padded_words(bits: int) -> None:
    matrix = random_plain(bits)
    tensors = pack_ct(matrix, sym=False)
    tensors["weight_packed"] = padded(matrix.codes, bits)
    tensors["weight_zero_point"] = padded(matrix.zero.T, bits).T.contiguous()
    spec = QuantSpec(bits, 64)
    assert equal(unpack_ct("l", tensors, spec, (ROWS, COLUMNS)), matrix)


def padded(codes: Tensor, bits: int) -> Tensor:
    """As many whole codes in each word as fit."""
    per = 32 // bits
    rows = []
    for row in codes.tolist():
        parts = [row[start : start + per] for start in range(0, len(row), per)]
        words = [sum(code << (bits * place) for place, code in enumerate(part)) for part in parts]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def test_awq() -> None:
    matrix = random_plain(4)
    places = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in a word, from its lowest bits on

    def words(codes: Tensor) -> Tensor:
        eights = codes.T.reshape(codes.shape[1], -1, 8).long()
        found = sum(eights[..., place] << (4 * rank) for rank, place in enumerate(places))
        assert isinstance(found, Tensor)
        return torch.where(found >= 2**31, found - 2**32, found).to(torch.int32)

    tensors = {
        "qweight": words(matrix.codes),
        "qzeros": words(matrix.zero),
        "scales": matrix.scale.T.contiguous(),
    }
    assert equal(unpack_awq("l", tensors, QuantSpec(4, 64), (ROWS, COLUMNS)), matrix)


EXPECTED = {2: "Q4_0", 3: "Q4_0", 4: "Q5_0", 5: "Q8_0", 6: "Q8_0", 7: "Q8_0"}
SYMMETRIC = {2: "Q2_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"}
DECODED = {kind.name: gguf.GGMLQuantizationType[kind.name] for kind in TYPES if kind.name != "Q2_0"}


@pytest.mark.parametrize("group", [32, 64, 96, COLUMNS])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_gguf_types_hold_the_same_numbers(bits: int, sym: bool, group: int) -> None:
    matrix = random_plain(bits, group, sym=sym)
    found = fitting(matrix)
    if bits == 8 and not sym:
        assert found is None
        return
    assert found is not None
    kind, values, scale = found
    wanted = (SYMMETRIC if sym else EXPECTED)[bits]
    assert kind.name == ("Q4_0" if wanted == "Q2_0" and group % 64 else wanted)
    data = kind.encode(values, scale)
    assert data.shape == (ROWS, COLUMNS // kind.weights * kind.nbytes)
    back, scales = kind.decode(data)
    assert torch.equal(back, values)
    assert torch.equal(scales, scale)
    if kind.name in DECODED:
        weights = torch.from_numpy(gguf.dequantize(data.numpy(), DECODED[kind.name]))
    else:
        weights = torch.from_numpy(slow_q2_0(data.numpy()))
    assert torch.equal(weights, decoded(matrix))


def slow_q2_0(data: np.ndarray) -> np.ndarray:
    """Blocks of 64: a float16, then four weights a byte, lowest first; d (q - 1)."""
    rows = []
    for row in data:
        values: list[float] = []
        for block in row.reshape(-1, 18):
            d = float(block[:2].copy().view(np.float16)[0])
            values += [
                d * ((int(byte) >> shift & 3) - 1) for byte in block[2:] for shift in (0, 2, 4, 6)
            ]
        rows.append(values)
    return np.array(rows, dtype=np.float32)


@given(
    st.sampled_from(range(2, 8)), st.booleans(), st.sampled_from([32, 64, COLUMNS]), st.integers()
)
def test_any_grid_that_is_not_refused_fits(bits: int, sym: bool, group: int, seed: int) -> None:
    matrix = random_plain(bits, group, sym=sym, seed=seed % 2**31)
    found = fitting(matrix)
    assert found is not None
    kind, values, scale = found
    weights = values.unflatten(1, (-1, kind.weights)).float() * scale.float().unsqueeze(2)
    assert torch.equal(weights.flatten(1), decoded(matrix))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": None}, "l.qweight is missing"),
        ({"scales": torch.zeros(3, ROWS, dtype=torch.float16)}, "scales are positive"),
        ({"scales": torch.ones(2, ROWS, dtype=torch.float16)}, r"need torch.float16 \[3, 40\]"),
        ({"g_idx": torch.zeros(COLUMNS, dtype=torch.int32)}, "l.g_idx is wrong"),
        ({"g_idx": torch.full((COLUMNS,), 7, dtype=torch.int32)}, "l.g_idx is wrong"),
        ({"g_idx": torch.full((COLUMNS,), -1, dtype=torch.int32)}, "l.g_idx is wrong"),
        ({"qzeros": torch.full((3, 5), -1, dtype=torch.int32)}, "zero point of 16"),
    ],
)
def test_damaged_gptq(change: dict[str, Tensor | None], message: str) -> None:
    tensors = {**pack_gptq(random_plain(4, least=1), 1, ordered=False), **change}
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    with pytest.raises(FormatError, match=message):
        unpack_gptq("l", kept, 4, 1, (ROWS, COLUMNS), 64, ordered=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_packed": None}, "l.weight_packed is missing"),
        ({"weight_zero_point": None}, "l.weight_zero_point is missing"),
        ({"weight_packed": torch.zeros(ROWS, 3, dtype=torch.int32)}, "is damaged"),
        ({"weight_shape": torch.tensor([COLUMNS, ROWS])}, "weight_shape says"),
        ({"weight_scale": torch.zeros(ROWS, 3)}, "positive and finite"),
        ({"weight_scale": torch.full((ROWS, 3), 0.5, dtype=torch.float64)}, "must be floats"),
    ],
)
def test_damaged_compressed_tensors(change: dict[str, Tensor | None], message: str) -> None:
    tensors = {**pack_ct(random_plain(4), sym=False), **change}
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    with pytest.raises(FormatError, match=message):
        unpack_ct("l", kept, QuantSpec(4, 64), (ROWS, COLUMNS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_any_dtype_that_float16_holds(dtype: torch.dtype) -> None:
    stored = random_plain(4)
    stored = replace(stored, scale=stored.scale.bfloat16().half().to(dtype))
    assert bool((stored.scale.float() > 0).all())
    tensors = {**pack_ct(stored, sym=False), "weight_scale": stored.scale}
    read = unpack_ct("l", tensors, QuantSpec(4, 64), (ROWS, COLUMNS))
    assert read.scale.dtype == dtype
    made = qtensor_of("l", read, sym=False)
    assert isinstance(made.grid.scale, Tensor)
    assert made.grid.scale.dtype == torch.float16
    torch.testing.assert_close(made.dequantize(), stored.decoded(), rtol=0, atol=0)
    if dtype == torch.float32:
        with pytest.raises(FormatError, match="l has scales that float16 does not hold"):
            qtensor_of("l", replace(read, scale=read.scale * (1 + 2**-20)), sym=False)


def test_scales_too_small_for_float16_are_refused() -> None:
    matrix = random_plain(4)
    qtensor = QTensor(matrix.codes, Grid(matrix.scale, matrix.zero, 4, 64, exponent=-40))
    with pytest.raises(FormatError, match=r"l has scales down to .* export --to float"):
        plain("l", qtensor)


def test_vllm_finds_the_rules_of_what_it_fuses() -> None:
    block = "model.layers.0"
    attention = {name: f"{block}.self_attn.{name}_proj" for name in "qkvo"}
    four, eight = QuantSpec(4, 64), QuantSpec(8, 64)
    kept = [f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"]
    specs = {f"{block}.mlp.{n}": four for n in range(4)}
    specs |= {layer: four if name == "o" else eight for name, layer in attention.items()}
    dynamic = settings_of(specs, False, 2, kept, "lm_head")["dynamic"]
    fused = r"model\.layers\.0\.self_attn\.qkv_proj$"
    assert dynamic[f"+:^{fused}"]["bits"] == 8
    assert r"-:^model\.layers\.0\.mlp\.gate_up_proj$" in dynamic
    specs[attention["k"]] = four  # which vLLM cannot multiply together
    assert not [key for key in settings_of(specs, False, 2, [], "")["dynamic"] if fused in key]
