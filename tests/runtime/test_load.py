"""What is said when a quantized model cannot be loaded is what went wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantine
from ggufs import write_gguf
from quantine import Calibration, CheckpointError, FormatError, Plan, PlanError
from quantine.formats.export import export
from quantine.formats.imported import source_files
from quantine.runtime.load import load_model
from quantine.source.locate import locate
from tiny_models import logits_of, random_model, tiny_config

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def out(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("load") / "out"
    plan = Plan.preset("rtn", bits=4, group_size=32)
    return quantine.quantize(tiny("llama"), path, plan, Calibration(samples=0)).path


@pytest.mark.parametrize("dtype", ["floa16", "int8", "load", "float8_e4m3fn", torch.int32])
def test_a_dtype_that_does_not_exist_is_named(out: Path, dtype: Any) -> None:
    with pytest.raises(PlanError, match=f"cannot be '?{dtype}'?: dtype must be auto, float32"):
        quantine.load(out, dtype=dtype)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "torch.float16", torch.float64])
def test_dtypes_have_names(out: Path, dtype: Any) -> None:
    wanted = torch.float32 if dtype == "auto" else dtype
    found = quantine.load(out, dtype=dtype)[0].dtype
    assert str(found).removeprefix("torch.") == str(wanted).removeprefix("torch.")


NO_MEMORY = [
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"),
    torch.OutOfMemoryError("CUDA out of memory."),
]


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", failing)


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_want_of_memory_is_no_damage(
    out: Path, tiny: Tiny, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, error)
    with pytest.raises(FormatError, match="does not fit in memory"):
        quantine.load(out)
    with pytest.raises(CheckpointError, match="does not fit in memory"):
        locate(tiny("llama")).float_model(torch.float32)


@pytest.mark.parametrize(
    "error", [AttributeError("no such method"), TypeError(), ZeroDivisionError()]
)
def test_faults_of_programs_are_no_damage(
    out: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, error)
    with pytest.raises(type(error)):
        quantine.load(out)


@pytest.mark.parametrize(
    "damage",
    [
        {"dtype": 3},
        {"pad_token_id": 10**9},
        {"num_hidden_layers": 2**40},
        {"hidden_act": "unheard"},
    ],
)
def test_a_damaged_config_is_called_so(out: Path, tmp_path: Path, damage: dict[str, Any]) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text()) | damage
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        quantine.load(copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("to", ["gptq", "compressed-tensors", "gguf"])
def test_what_others_packed_computes_with_the_floats_that_are_quantized(
    to: str, dtype: torch.dtype, out: Path, tmp_path: Path
) -> None:
    path = export(out, tmp_path / to, to).path
    model = load_model(source := locate(next(path.glob("*.gguf"), path)), dtype)
    names = list(source_files(source).headers)
    read = source_files(source).read([(name, None) for name in names])
    for name, tensor in zip(names, read, strict=True):
        assert torch.equal(model.get_parameter(name), tensor.to(dtype)), name
    wanted = load_model(locate(export(out, tmp_path / "float", "float").path), dtype)
    assert torch.equal(logits_of(model), logits_of(wanted))


def test_settings_of_generation_beside_packed_weights_count(out: Path, tmp_path: Path) -> None:
    path = export(out, tmp_path / "gptq", "gptq").path
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    model = load_model(locate(path), torch.float32)
    assert model.generation_config.eos_token_id == [7, 8]
    assert not hasattr(model.config, "quantization_config")
    (path / "generation_config.json").write_text('{"eos_token_id": [7')
    with pytest.raises(CheckpointError, match="gptq cannot be loaded"):
        load_model(locate(path), torch.float32)


def test_models_of_mixed_dtypes_keep_what_their_class_keeps_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(tiny_config("llama"))
    monkeypatch.setattr(type(model), "_keep_in_fp32_modules_strict", ["norm"])
    loaded = load_model(locate(write_gguf(tmp_path / "m.gguf", model)), torch.bfloat16)
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)
    assert loaded.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("library", ["torchao", "vptq"])
def test_a_library_that_is_not_there_is_named(library: str, tiny: Tiny, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": library}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{library}.*; install that, or give the float mod"):
        load_model(locate(path), torch.float32)


def test_an_adapter_beside_packed_weights_is_not_left_out(out: Path, tmp_path: Path) -> None:
    path = export(out, tmp_path / "gptq", "gptq").path
    (path / "adapter_config.json").write_text("{}")
    for use in (
        lambda: load_model(locate(path), torch.float32),
        lambda: quantine.quantize(
            path, tmp_path / "again", Plan.preset("rtn", bits=4), Calibration(samples=0)
        ),
    ):
        with pytest.raises(CheckpointError, match="holds an adapter"):
            use()
