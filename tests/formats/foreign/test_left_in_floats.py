"""Exports to the nearest grids in which matrices, or all of them, become floats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from quantine import Calibration, FormatError, Plan, quantize
from quantine.formats.export import export
from quantine.formats.finished import FinishedDirectory
from quantine.formats.foreign.compressed_tensors.read import LAYOUT as COMPRESSED_TENSORS
from quantine.formats.foreign.gptq.read import LAYOUT as GPTQ
from quantine.formats.imported import import_model
from tiny_models import build, tiny_config

LAYOUTS = {"gptq": GPTQ, "compressed-tensors": COMPRESSED_TENSORS}


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


@pytest.mark.parametrize("to", LAYOUTS)
def test_settings_call_float_what_is_stored_so(to: str, tmp_path: Path) -> None:
    out = quantized(tmp_path, intermediate_size=80)
    path = export(out, tmp_path / to, to, nearest=True, engine="vllm").path
    layers = list(FinishedDirectory(out).description.layers)
    stored = load_file(path / "model.safetensors")
    floats = {name for name in layers if f"{name}.weight" in stored}
    assert floats == {name for name in layers if ".mlp." in name}
    said = json.loads((path / "config.json").read_text())["quantization_config"]
    spec = LAYOUTS[to].read_settings(said)
    assert {name for name in layers if spec(name) is None} == floats
    if to == "gptq":  # vLLM looks for both of these by a name of its own
        assert spec("model.layers.0.mlp.gate_up_proj") is None
    assert import_model(path, tmp_path / "back").layers == len(layers) - len(floats)
