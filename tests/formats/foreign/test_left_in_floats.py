"""Exports to the nearest grids in which matrices, or all of them, become floats."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantine import Calibration, FormatError, Plan, quantize
from quantine.formats.export import export
from tiny_models import build, tiny_config

LAYOUTS = ["gptq", "compressed-tensors"]


def quantized(directory: Path, **sizes: int) -> Path:
    """A model in groups of 16, of which vLLM serves what has shapes of multiples of 32."""
    model = build(tiny_config("llama", **sizes), directory / "model")
    plan = Plan.preset("rtn", bits=4, group_size=16)
    return quantize(model, directory / "out", plan, Calibration(samples=0)).path


@pytest.mark.parametrize("to", LAYOUTS)
def test_nothing_quantized_is_refused_before_anything_is_written(to: str, tmp_path: Path) -> None:
    out = quantized(tmp_path, hidden_size=48, intermediate_size=80)
    before = set(tmp_path.iterdir())
    said = f"nothing would be quantized in layout {to}, as .*q_proj .* multiples of 32.*--to float"
    with pytest.raises(FormatError, match=said):
        export(out, tmp_path / to, to, nearest=True, engine="vllm")
    assert set(tmp_path.iterdir()) == before
    export(out, tmp_path / "float", "float", nearest=True, weights_of=to)
