"""Random checkpoints of any shape: what transformers and quantine read of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantine
from quantine import Calibration, Plan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY: dict[str, dict[str, Any]] = {
    "llama-70b": {**SMALL, "num_key_value_heads": 2, "intermediate_size": 96},
    "qwen3-moe-30b": {
        **SMALL,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "opt-6.7b": {**SMALL, "word_embed_proj_dim": 64, "ffn_dim": 96},
}


@pytest.fixture(scope="module")
def synthetic() -> Any:
    """The program as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import make_synthetic
    finally:
        sys.path.remove(str(BENCHMARKS))
    return make_synthetic


@pytest.mark.parametrize("shape", TINY)
def test_transformers_loads_every_tensor(shape: str, synthetic: Any, tmp_path: Path) -> None:
    synthetic.write_checkpoint(shape, tmp_path / "m", TINY[shape], shard_bytes=100_000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert bool(torch.isfinite(model(input_ids=torch.arange(40)[None]).logits).all())


def test_weights_are_random_and_some_are_large(
    synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path
) -> None:
    synthetic.write_checkpoint("llama-70b", tmp_path / "a", TINY["llama-70b"])
    monkeypatch.setattr(synthetic, "CHUNK", 64 * 7)
    synthetic.write_checkpoint("llama-70b", tmp_path / "b", TINY["llama-70b"])
    synthetic.write_checkpoint("llama-70b", tmp_path / "c", TINY["llama-70b"], seed=1)
    found = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name).model.layers[1].mlp.up_proj.weight
        for name in "abc"
    ]
    assert found[0].shape == found[1].shape == (96, 64)
    assert not torch.equal(found[0], found[2])
    for weight in found:
        by_input = weight.detach().float().square().mean(0).sqrt()
        assert by_input.max() > 5 * by_input.median()
    calibration = Calibration(str(text_file), samples=4, seqlen=32)
    plan = Plan.preset("spqr", bits=3, group_size=16)
    report = quantine.quantize(tmp_path / "a", tmp_path / "out", plan, calibration).report
    assert len(report["layers"]) == 14
