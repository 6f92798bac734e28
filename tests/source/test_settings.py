"""Fields of a configuration that fail only where a model runs are refused where it is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

import quantine
from quantine import Calibration, CheckpointError, Plan
from quantine.source.locate import locate
from quantine.source.settings import MOST_BLOCKS, check_generation, check_settings
from quantine.source.weight_files import INDEX, weight_files
from tiny_models import FAMILIES, tiny_config

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("name", FAMILIES)
def test_sound_configurations_pass(name: str) -> None:
    check_settings(tiny_config(name))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"num_hidden_layers": MOST_BLOCKS + 1}, f"whole number up to {MOST_BLOCKS}"),
        ({"return_dict": False}, "return_dict is False"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id is"),
        ({"bos_token_id": 2**63}, "bos_token_id is"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"initializer_range": float("inf")}, "initializer_range is inf"),
    ],
)
def test_other_values_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    config = tiny_config("mistral")
    for name, value in changes.items():
        config.__dict__[name] = value
    with pytest.raises(CheckpointError, match=said):
        check_settings(config)


def test_windows_are_needed_where_layers_have_them() -> None:
    config = tiny_config("gemma3")
    config.__dict__["sliding_window"] = None
    with pytest.raises(CheckpointError, match="some layers are of type sliding_attention"):
        check_settings(config)


@pytest.mark.parametrize("fields", [{"eos_token_id": "</s>"}, {"output_hidden_states": [0]}])
def test_settings_for_generation_are_checked(fields: dict[str, Any]) -> None:
    config = GenerationConfig()
    check_generation(config)
    config.__dict__.update(fields)
    with pytest.raises(CheckpointError, match=next(iter(fields))):
        check_generation(config)


def test_a_source_with_such_a_field_is_refused_before_work(tiny: Tiny, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("mistral"), tmp_path / "model"))
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 0}))
    plan = Plan.preset("rtn", bits=4, group_size=32)
    with pytest.raises(CheckpointError, match="sliding_window is 0"):
        quantine.quantize(model, tmp_path / "out", plan, Calibration(samples=0))
    assert not (tmp_path / "out").exists()


def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 10**5)
    (tmp_path / INDEX).write_text("[" * 10**5)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        locate(tmp_path).quant_method()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"{INDEX} is damaged"):
        weight_files(tmp_path)


def test_a_tokenizer_is_tried(tiny: Tiny, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "long"}))
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be read"):
        locate(model).tokenizer()
