"""Activations of architectures that nobody has described, from a plan to a loaded directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import quantine
from quantine import Calibration, Plan, quantize
from quantine.activations.modules import AttentionSites, PermutedNorm
from quantine.cli import main
from quantine.errors import FamilyError
from quantine.families.derivation.small import small_config
from quantine.runtime.modules import QuantLinear
from tiny_models import build, logits_of, some_tokens

READER = """
import sys
import torch
import quantine
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
model, _ = quantine.load(sys.argv[1])
tokens = load_file(sys.argv[2])["tokens"]
with torch.no_grad():
    save_file({"logits": model(input_ids=tokens).logits.contiguous()}, sys.argv[3])
"""


def source_of(kind: str, directory: Path, **changes: Any) -> Path:
    config = small_config(AutoConfig.for_model(kind, **changes), 2)
    return build(config, directory, bos=False)


def rounding(model: Any, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("scheme", ["W4A8", "W4A4KV"])
def test_another_process_computes_the_same(scheme: str, tmp_path: Path, short: Calibration) -> None:
    from safetensors.torch import save_file

    source = source_of("stablelm", tmp_path / "model")
    out = quantize(source, tmp_path / "out", Plan.scheme(scheme, method="rtn"), short).path
    model, _ = quantine.load(out)
    assert rounding(model, AttentionSites) == 2
    assert rounding(model, PermutedNorm) == (4 if scheme == "W4A8" else 0) or scheme != "W4A8"
    save_file({"tokens": some_tokens()}, tmp_path / "tokens.safetensors")
    paths = [out, tmp_path / "tokens.safetensors", tmp_path / "logits.safetensors"]
    subprocess.run([sys.executable, "-c", READER, *map(str, paths)], check=True)
    assert torch.equal(load_file(paths[2])["logits"], logits_of(model))


def test_what_is_left_alone_is_named(
    tmp_path: Path, short: Calibration, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_of("gpt_oss", tmp_path / "model")
    result = quantize(source, tmp_path / "out", Plan.scheme("W4A8", method="rtn"), short)
    left = {one["name"]: one["reason"] for one in result.report["left"]}
    assert left["model.layers.1"] == "its attention computes in a way of its own"
    assert left["model.layers.0.mlp.experts"] == "inputs of experts are not rounded yet"
    model, _ = quantine.load(result.path)
    assert rounding(model, AttentionSites) == 0
    assert model.config._attn_implementation != "quantine"
    readers = [
        name
        for name, m in model.named_modules()
        if getattr(m, "inputs", None) is not None and isinstance(m, QuantLinear)
    ]
    assert [name.rpartition(".")[2] for name in readers[:4]] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]
    main(["plan", str(source), "--scheme", "W4A8"])
    assert "not rounded: model.layers.*: its attention computes" in capsys.readouterr().out


def test_keys_that_cannot_be_rounded_are_refused(tmp_path: Path, short: Calibration) -> None:
    source = source_of("gpt_oss", tmp_path / "model")
    with pytest.raises(FamilyError, match=r"gpt_oss models cannot be quantized at key, value: "):
        quantize(source, tmp_path / "out", Plan.scheme("W4A4KV"), short)
