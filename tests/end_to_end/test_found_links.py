"""Activations of architectures that nobody has described, from a plan to a loaded directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import quantine
from other_process import logits_elsewhere
from quantine import Calibration, Plan, quantize
from quantine.activations.modules import AttentionSites, PermutedNorm
from quantine.cli import main
from quantine.errors import FamilyError
from quantine.families.derivation.small import small_config
from quantine.runtime.modules import QuantLinear
from tiny_models import build, logits_of, some_tokens


def source_of(kind: str, directory: Path, **changes: Any) -> Path:
    config = small_config(AutoConfig.for_model(kind, **changes), 2)
    return build(config, directory, bos=False)


def rounding(model: Any, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def test_another_process_computes_the_same(tmp_path: Path, short: Calibration) -> None:
    source = source_of("stablelm", tmp_path / "model")
    norms = {"W4A8": 4, "W4A4KV": None}
    models = {}
    for scheme, count in norms.items():
        plan = Plan.scheme(scheme, method="rtn")
        out = quantize(source, tmp_path / scheme, plan, short).path
        models[out] = quantine.load(out, torch.float32)[0]
        assert rounding(models[out], AttentionSites) == 2
        assert count in (None, rounding(models[out], PermutedNorm))
    elsewhere = logits_elsewhere(models, some_tokens(), ["float32"], tmp_path)
    for out, model in models.items():
        assert torch.equal(elsewhere[f"{out} float32"], logits_of(model))


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
