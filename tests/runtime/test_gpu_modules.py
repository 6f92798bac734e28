"""Packed modules where a GPU's programs compute, which Triton interprets here on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantine import Calibration, Plan, load, quantize
from quantine.core.spec import QuantSpec
from quantine.formats import format_named
from quantine.kernels import backend
from quantine.kernels.integer.units.gridded_matrix import GriddedMatrix
from quantine.kernels.matrix import TILED_ROWS
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix
from quantine.methods.rtn import RTN
from quantine.runtime.modules import QuantEmbedding, QuantLinear, TiedHead
from quantine.runtime.packed import packed_modules
from samples import generator
from tiny_models import build, logits_of, some_tokens, tiny_config

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

Packed = Callable[[str, str], Path]

NARROW = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
}
"""The interpreter calls a program for every few rows."""


@pytest.mark.parametrize("plan", ["gptq", "mixed"])
def test_logits_are_those_of_the_modules(
    packed: Packed, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load(packed("llama", plan), arithmetic="exact")
    tokens = some_tokens(3)
    expected = logits_of(model, tokens)
    monkeypatch.setattr(backend, "of", lambda *_: "triton")
    model, _ = load(packed("llama", plan))
    found = logits_of(model, tokens)
    assert any(isinstance(module.matrix(), UnitMatrix) for _, module in packed_modules(model))
    assert float((found - expected).abs().max()) <= 1e-2 * float(expected.abs().max())


def test_very_many_rows_meet_a_decoded_matrix(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load(packed("llama", "gptq"), arithmetic="exact")
    monkeypatch.setattr(backend, "of", lambda *_: "triton")
    _, module = next(iter(packed_modules(model)))
    x = torch.randn(TILED_ROWS + 1, module.in_features, generator=torch.Generator().manual_seed(1))
    expected = x @ module.dequantize().T
    assert float((module.product(x) - expected).abs().max()) <= 2e-3 * float(expected.abs().max())


def test_a_table_that_is_the_head_is_looked_up_in_what_the_head_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec, weight = QuantSpec(4, 32), torch.randn(70, 96, generator=generator(2))
    packed = format_named("dense").pack(RTN()(weight, None, spec))
    table, tokens = QuantEmbedding("dense", spec, 70, 96, packed), torch.tensor([[69, 3], [0, 68]])
    expected = table.dequantize()[tokens]
    logits = expected @ table.dequantize().T
    monkeypatch.setattr(backend, "of", lambda *_: "triton")
    pair = torch.nn.Sequential(table, TiedHead(table))
    torch.testing.assert_close(table(tokens), expected, rtol=2**-10, atol=0)
    assert float((pair(tokens) - logits).abs().max()) <= 5e-3 * float(logits.abs().max())
    whole = torch.compile(table, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(tokens), table(tokens))


@pytest.mark.parametrize("plan", ["W4A8", "W4A4"])
def test_rounded_activations_meet_codes(
    plan: str, short: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build(tiny_config("llama", **NARROW), tmp_path / "float")
    out = quantize(source, tmp_path / "out", Plan.scheme(plan, arithmetic="exact"), short).path
    model, _ = load(out, arithmetic="exact")
    tokens = some_tokens(5)
    expected = logits_of(model, tokens)
    monkeypatch.setattr(backend, "of", lambda *_: "triton")
    model, _ = load(out)
    rounded = [m for _, m in packed_modules(model) if isinstance(m, QuantLinear) and m.inputs]
    assert rounded
    assert all(isinstance(module.input_grid(), GriddedMatrix) for module in rounded)
    found = logits_of(model, tokens)  # one rounding for what reads the same norm
    assert float((found - expected).abs().max()) <= 2e-2 * float(expected.abs().max())
