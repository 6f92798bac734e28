"""Float models are loaded whole, or not at all; what is said of them is what went wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantine
from ggufs import MODELS, write_gguf
from quantine import Calibration, CheckpointError, FamilyError, Plan
from quantine.calibrate.skeleton import skeleton
from quantine.source.locate import locate
from tiny_models import build, logits_of, random_model, tiny_config

RTN = Plan.preset("rtn", bits=8, group_size=32)
NONE = Calibration(samples=0)
Tiny = Callable[[str], Path]


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def edit(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {
        name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()
    }
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def set_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", MODELS)
def test_a_gguf_tokenizer_is_what_transformers_makes_of_the_file_without_further_tokens(
    family: str, tmp_path: Path
) -> None:
    config = tiny_config(family)
    path = write_gguf(tmp_path / "m.gguf", random_model(config))
    found = locate(path).tokenizer()
    made = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    expected = json.loads(made.backend_tokenizer.to_str())
    added = [one for one in expected["added_tokens"] if one["id"] < config.vocab_size]
    assert len(added) < len(expected["added_tokens"])
    assert json.loads(found.backend_tokenizer.to_str()) == {**expected, "added_tokens": added}
    assert found("<s>the hen</s>").input_ids == made("<s>the hen</s>").input_ids
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    assert found.special_tokens_map == special
    found.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(saved) == config.vocab_size
    assert saved.special_tokens_map == special


WRONG: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "missing": lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
    "of other shape": lambda t: t.update({"model.norm.weight": torch.ones(63)}),
    "not used": lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(96, 64)}),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_float_model_is_loaded_whole_or_not_at_all(
    copy: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any]
) -> None:
    edit(copy, change)
    with pytest.raises(CheckpointError):
        locate(copy).float_model(torch.float32)
    with pytest.raises(CheckpointError):
        quantine.quantize(copy, tmp_path / "out", RTN, NONE)
    assert not (tmp_path / "out").exists()


def test_a_float_model_with_a_tensor_in_two_files_is_not_loaded(copy: Path) -> None:
    whole = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").rename(copy / "a.safetensors")
    save_file({"model.norm.weight": torch.zeros(64)}, copy / "b.safetensors", {"format": "pt"})
    named = {**dict.fromkeys(whole, "a.safetensors"), "model.norm.weight": "b.safetensors"}
    index = {"metadata": {}, "weight_map": named}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is in a\.safetensors and in b"):
        locate(copy).float_model(torch.float32)


def test_layers_beyond_the_config_are_named(copy: Path, tmp_path: Path) -> None:
    set_config(copy, num_hidden_layers=1)
    with pytest.raises(CheckpointError) as refused:
        quantine.quantize(copy, tmp_path / "out", RTN, NONE)
    said = str(refused.value).replace(str(copy), "")
    assert "model.layers.1.input_layernorm.weight" in said
    assert "9 tensors in all" in said
    assert len(said) < 300


def test_an_adapter_is_not_left_out(copy: Path, tmp_path: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        quantine.quantize(copy, tmp_path / "out", RTN, NONE)
    with pytest.raises(CheckpointError, match="holds an adapter"):
        locate(copy).float_model(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64])
def test_other_numbers_than_floats_are_refused_by_name(
    copy: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit(copy, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=rf"{name} is stored as [A-Z0-9_]+: only checkpoints"):
        quantine.quantize(copy, tmp_path / "out", RTN, NONE)


@pytest.mark.parametrize("window", [0, -1])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "phi3"])
def test_a_window_without_tokens_is_refused(
    family: str, window: int, tiny: Tiny, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny(family), tmp_path / "model"))
    set_config(model, sliding_window=window)
    with pytest.raises(CheckpointError, match=f"sliding_window is {window} "):
        quantine.quantize(model, tmp_path / "out", RTN, NONE)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer"])
def test_more_blocks_than_any_model_has_are_refused_at_once(copy: Path, key: str) -> None:
    set_config(copy, **{key: 2**40})
    with pytest.raises(CheckpointError, match=f"no model has {key} {2**40}"):
        locate(copy).config()


def test_architectures_unknown_and_damaged_are_told_apart(copy: Path) -> None:
    set_config(copy, num_attention_heads=7)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        locate(copy).config()
    set_config(copy, model_type="unheard_of")
    with pytest.raises(FamilyError, match="unheard_of"):
        locate(copy).config()


OWN_CODE = {
    "AutoConfig": "own.OwnConfig",
    "AutoModelForCausalLM": "own.OwnModel",
    "AutoTokenizer": ["own.OwnTokenizer", None],
}


def test_code_of_a_directory_is_never_run(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append("asked") or "y")
    (copy / "own.py").write_text(f"open({str(copy / 'ran')!r}, 'w')")
    set_config(copy, auto_map=OWN_CODE)
    source = locate(copy)
    assert type(source.float_model(torch.float32)).__name__ == "LlamaForCausalLM"
    assert skeleton(source.config()).config.model_type == "llama"
    assert source.tokenizer()
    set_config(copy, model_type="vit")
    with pytest.raises(CheckpointError):
        source.bare_model(source.config())
    for unknown in ("unheard_of", ["llama"]):
        set_config(copy, model_type=unknown)
        with pytest.raises(FamilyError, match=r"own code .* is never run"):
            source.config()
    assert not asked
    assert not (copy / "ran").exists()


def test_scores_are_bounded_in_every_transformers(tmp_path: Path) -> None:
    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return logits_of(model.eval())

    directory = build(tiny_config("gemma2", attn_logit_softcapping=0.02), tmp_path / "model")
    eager = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    source = locate(directory)
    assert torch.equal(logits(source.float_model(torch.float32)), logits(eager))
    assert skeleton(source.config()).config._attn_implementation == "eager"
    quantine.quantize(directory, tmp_path / "out", RTN, NONE)
    for asked in ({}, {"attn_implementation": "sdpa"}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **asked)
        assert model.config._attn_implementation == "eager"
