"""Damage to models and outputs, found by a reviewer, that once ended in a traceback or passed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantine
from quantine import Calibration, CheckpointError, FormatError, OutputError, Plan
from quantine.formats.inventory import inventory

RTN = Plan.preset("rtn", bits=4, group_size=32)
NONE = Calibration(samples=0)
Tiny = Callable[[str], Path]


@pytest.fixture
def out(tiny: Tiny, tmp_path: Path) -> Path:
    return quantine.quantize(tiny("llama"), tmp_path / "out", RTN, NONE).path


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


DESCRIPTIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no layers": lambda q: q.pop("layers"),
    "layers are a list": lambda q: q.update(layers=[]),
    "no such scheme": lambda q: next(iter(q["layers"].values())).update(scheme=7),
    "no bits": lambda q: q["schemes"][0].pop("bits"),
    "other bits": lambda q: q["schemes"][0].update(bits=3),
    "version is text": lambda q: q.update(format_version="1"),
    "newer version": lambda q: q.update(format_version=99),
    "unknown format": lambda q: q["schemes"][0].update(format="unheard"),
}


@pytest.mark.parametrize("edit", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_a_damaged_description_is_refused(out: Path, edit: Callable[..., object]) -> None:
    change(out / "config.json", lambda config: edit(config["quantization_config"]))
    with pytest.raises(FormatError):
        inventory(out)


@pytest.mark.parametrize("edit", ["no bits", "no such scheme", "newer version"])
def test_a_damaged_description_is_not_loaded(out: Path, edit: str) -> None:
    change(out / "config.json", lambda c: DESCRIPTIONS[edit](c["quantization_config"]))
    with pytest.raises(FormatError):
        quantine.load(out)


def test_a_cut_file_is_refused(out: Path) -> None:
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FormatError, match="cut off"):
        inventory(out)
    with pytest.raises(FormatError):
        quantine.load(out)


def test_weights_that_are_not_floats_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    name = next(key for key in tensors if key.endswith("up_proj.weight"))
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="I8"):
        quantine.quantize(model, tmp_path / "out", RTN, NONE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [{"num_hidden_layers": "x"}, {"hidden_act": "unheard"}])
def test_damaged_configurations_are_refused(
    tiny: Tiny, tmp_path: Path, damage: dict[str, Any]
) -> None:
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    change(model / "config.json", lambda config: config.update(damage))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        quantine.quantize(model, tmp_path / "out", RTN, NONE)


def test_an_output_below_a_file_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        quantine.quantize(tiny("llama"), tmp_path / "file" / "out", RTN, NONE)
    with pytest.raises(OutputError):
        quantine.quantize(tiny("llama"), tmp_path / ("x" * 300), RTN, NONE)
