"""Granite's multipliers, which the native decoder takes into norms and the embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_decoder import FAST_TOLERANCE, assert_follows
from test_overrides import attribute, by_modules, check_follows, check_returns, far, scores
from transformers import AutoConfig

from quantine import Calibration, Plan, load, quantize
from quantine.errors import BackendUnavailable
from quantine.runtime.decoder import decoder_for
from tiny_models import ROPE, build, logits_of, random_model, some_tokens

FACTORS = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 8.0,
}


def granite(**changes: Any) -> Any:
    values = {**ROPE, "num_hidden_layers": 3, **FACTORS, "rms_norm_eps": 0.5, **changes}
    return AutoConfig.for_model("granite", **values)


@pytest.mark.parametrize("tied", [True, False])
def test_prompts_and_steps_are_those_of_the_modules(tied: bool) -> None:
    model = random_model(granite(tie_word_embeddings=tied))
    tokens = some_tokens(40, 1)
    assert_follows(decoder_for(model, 40), tokens[0], logits_of(model, tokens)[0], 17)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("granite")
    source = build(granite(), scratch / "model")
    rules = [
        {"match": "@embedding", "method": "rtn", "bits": 8, "group_size": 16},
        {"match": "@blocks", "method": "rtn", "bits": 4, "group_size": 16},
    ]
    plan = Plan.from_dict({"rules": rules, "arithmetic": "exact"})
    return quantize(source, scratch / "out", plan, Calibration(samples=0)).path


def test_packed_models_decode_as_they_compute(packed: Path) -> None:
    model, _ = load(packed, dtype=torch.float32)
    tokens = some_tokens(24, 1)
    wanted = logits_of(model, tokens)[0]
    assert_follows(decoder_for(model, 24), tokens[0], wanted, 11)
    fast = decoder_for(model, 24, arithmetic="fast")
    assert_follows(fast, tokens[0], wanted, 11, FAST_TOLERANCE)


def test_a_changed_multiplier_counts(packed: Path) -> None:
    model: Any = load(packed, dtype=torch.float32)[0]
    model.generation_config.eos_token_id = None
    before = scores(model, model.generate)
    owners = {
        "logits_scaling": model.config,
        "embedding_multiplier": model.model,
        "residual_multiplier": model.model.layers[1],  # of one block, which is not native
        "scaling": model.model.layers[0].self_attn,
    }
    for name, owner in owners.items():
        with attribute(owner, name, getattr(owner, name) * 1.7):
            wanted = by_modules(model)
            assert far(wanted, before), name
            check_follows(model, wanted, name)
        check_returns(model, before, name)


@pytest.mark.parametrize("name", ["residual_multiplier", "logits_scaling"])
def test_nothing_is_divided_by_0(name: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"blocks are multiplied by \[0\.\d*\], logits by"):
        decoder_for(random_model(granite(**{name: 0.0})), 8)
