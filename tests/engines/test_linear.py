"""Layers of several matrices compute what their matrices do one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantine import RTN, QuantSpec
from quantine.activations.grids import StaticGrid, TokenGrid
from quantine.core.qtensor import QTensor
from quantine.engines.linear import FloatPart, FusedLinear, PackedPart
from quantine.formats import format_named
from quantine.kernels import backend, integer
from quantine.kernels.integer.units.inputs import InputUnits, Rounded
from quantine.kernels.matrix import FEW_ROWS
from quantine.runtime.modules import INTEGER_ROWS, QuantLinear
from samples import generator, observed, random_weight

WIDTH = 64
SPECS = (
    QuantSpec(bits=4, group_size=16),
    QuantSpec(bits=3, group_size=-1, sym=True),
    QuantSpec(bits=8, group_size=32, group_axis="out"),
)
ROWS = (1, INTEGER_ROWS + 1, FEW_ROWS + 1)


def solved(spec: QuantSpec, rows: int = 32) -> QTensor:
    inputs = torch.randn(80, WIDTH, generator=generator(1))
    return RTN()(random_weight(rows, WIDTH, seed=rows), observed(inputs), spec)


def some(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, WIDTH, generator=generator(rows)).to(dtype)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_stand_one_after_another(rows: int, dtype: torch.dtype) -> None:
    qtensors = [solved(spec, size) for spec, size in zip(SPECS, (32, 16, 64), strict=True)]
    parts = [PackedPart(qtensor, "exact") for qtensor in qtensors]
    x = some(rows, dtype)
    found = FusedLinear(parts)(x)
    assert found.dtype == dtype
    assert FusedLinear(parts).out_features == found.shape[1] == 112
    expected = torch.cat([part(x) for part in parts], 1)
    assert torch.equal(found, expected) if rows > FEW_ROWS else True
    weight = torch.cat([qtensor.dequantize() for qtensor in qtensors])
    loose = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, (x.float() @ weight.T).to(dtype), **loose)


def test_float_and_packed_matrices_share_a_layer() -> None:
    qtensor, weight = solved(SPECS[0]), random_weight(16, WIDTH)
    x = some(5)
    found = FusedLinear([PackedPart(qtensor, "fast"), FloatPart(weight)])(x)
    torch.testing.assert_close(found[:, 32:], x @ weight.T)
    torch.testing.assert_close(found[:, :32], x @ qtensor.dequantize().T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["static", "factors", "token"])
def test_rounded_inputs_are_multiplied_as_in_quantines_own_module(rows: int, kind: str) -> None:
    spec = QuantSpec(bits=4, group_size=0, cluster_sizes=(16, 48))
    labels = torch.tensor([0] * 16 + [1] * 48, dtype=torch.int32)
    scale, zero = torch.tensor([0.01, 0.02]), torch.tensor([120.0, 130.0])
    reach = torch.tensor([3.0]) if kind == "factors" else None
    grid: Any = TokenGrid(8) if kind == "token" else StaticGrid(8, scale, zero, labels, None, reach)
    qtensor, layout = solved(spec), format_named("dense")
    own = QuantLinear("dense", spec, 32, WIDTH, layout.pack(qtensor))
    own.arithmetic = "exact"
    own.inputs = grid
    x = some(rows)
    assert torch.equal(FusedLinear([PackedPart(qtensor, "exact", grid)])(x), own(x))
    weight = random_weight(16, WIDTH)
    torch.testing.assert_close(FloatPart(weight, grid)(x), grid(x) @ weight.T)


def test_parts_that_round_alike_share_codes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    monkeypatch.setattr(backend, "of", lambda *_: "triton")
    rounded, rounds = [], integer.rounded

    def counted(x: Tensor, inputs: InputUnits) -> Rounded:
        rounded.append(inputs)
        return rounds(x, inputs)

    monkeypatch.setattr(integer, "rounded", counted)
    plain, clustered = QuantSpec(4, 32), QuantSpec(4, 0, cluster_sizes=(16, 48))
    parts: list[FloatPart | PackedPart] = [
        PackedPart(solved(spec, 2), "fast", TokenGrid(bits))
        for spec, bits in ((plain, 8), (clustered, 8), (plain, 8), (plain, 4))
    ]
    parts.insert(1, FloatPart(random_weight(3, WIDTH), TokenGrid(8)))
    x = some(1)
    with torch.inference_mode():  # in which engines run models
        found = FusedLinear(parts)(x)
        assert len(rounded) == 3
        assert torch.equal(found, torch.cat([part(x) for part in parts], 1))


def test_orders_of_inputs_and_outputs() -> None:
    qtensor, x = solved(SPECS[0]), some(3)
    inputs = torch.randperm(WIDTH, generator=generator(4))
    outputs = torch.randperm(32, generator=generator(5))
    found = FusedLinear([PackedPart(qtensor, "exact")], inputs.int(), outputs)(x)
    torch.testing.assert_close(found, (x[:, inputs] @ qtensor.dequantize().T)[:, outputs])


def test_what_no_kernel_reads_is_decoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    odd = QuantSpec(bits=4, group_size=32, zero_bits=16, minimum=True)  # llama.cpp's Q4_1
    part = PackedPart(solved(odd), "exact")
    assert part.matrix is None
    assert not part.is_plain
    torch.testing.assert_close(part(some(3)), some(3) @ solved(odd).dequantize().T)


def test_small_weights_in_float16() -> None:
    spec, weight = QuantSpec(bits=8, group_size=16), random_weight(32, WIDTH) * 1e-7
    qtensor = RTN()(weight, observed(torch.randn(80, WIDTH, generator=generator(1))), spec)
    assert qtensor.grid.exponent
    x = some(3, torch.float16) * 1e3
    found = FusedLinear([PackedPart(qtensor, "exact")])(x)
    torch.testing.assert_close(found, (x.float() @ qtensor.dequantize().T).half())


def test_autocast_changes_nothing() -> None:
    layer = FusedLinear([FloatPart(random_weight(16, WIDTH))])
    expected = layer(some(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(some(3)), expected)
