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
from quantine import Calibration, CheckpointError, FormatError, Plan, PlanError
from quantine.source.locate import locate

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
