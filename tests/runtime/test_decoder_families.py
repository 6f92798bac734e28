"""The native decoder of families whose blocks differ from Llama's, against their modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from test_decoder import FAST_TOLERANCE, assert_follows
from torch import nn
from transformers import AutoConfig

from quantine import load
from quantine.errors import BackendUnavailable
from quantine.kernels import backend
from quantine.runtime.decoder import decoder_for
from quantine.runtime.decoder_heads import Heads, Slice
from quantine.runtime.hf_generate import Generate
from tiny_models import FAMILIES, ROPE, logits_of, random_model, some_tokens

Packed = Callable[[str, str], Path]
Variant = tuple[str, dict[str, Any]]

GLM: Final = {**ROPE, "num_hidden_layers": 2, "head_dim": 32, "pad_token_id": 0}
PARTIAL: Final = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
VARIANTS: Final[dict[str, Variant]] = {
    "gemma2": FAMILIES["gemma2"],
    "gemma3, logits": ("gemma3_text", {**FAMILIES["gemma3"][1], "final_logit_softcapping": 2.0}),
    "phi3": FAMILIES["phi3"],
    "phi3, a window": (
        "phi3",
        {**FAMILIES["phi3"][1], "rope_parameters": PARTIAL, "head_dim": 16, "sliding_window": 9},
    ),
    "olmo2": ("olmo2", {**ROPE, "num_hidden_layers": 2, "attention_bias": True}),
    "glm4": ("glm4", GLM),
    "glm4, a quarter": ("glm4", {**GLM, "rope_parameters": PARTIAL, "attention_bias": True}),
    "gpt2": FAMILIES["gpt2"],
    "gpt2, scales": ("gpt2", {**FAMILIES["gpt2"][1], "scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": FAMILIES["neox_parallel"],
    "gpt_neox, sequential": FAMILIES["neox_sequential"],
    "bloom": FAMILIES["bloom"],
    "falcon, one head": FAMILIES["falcon_old"],
    "falcon, every head": (
        "falcon",
        {**FAMILIES["falcon_old"][1], "multi_query": False, "num_attention_heads": 2},
    ),
    "falcon, groups": FAMILIES["falcon_new"],
    "falcon, one norm": (
        "falcon",
        {**FAMILIES["falcon_new"][1], "num_ln_in_parallel_attn": 1, "num_attention_heads": 8},
    ),
    "falcon, ALiBi": FAMILIES["falcon_alibi"],
}


def variant(name: str, **changes: Any) -> Any:
    kind, values = VARIANTS[name]
    return random_model(AutoConfig.for_model(kind, **{**values, **changes}))


@pytest.mark.parametrize("name", VARIANTS)
def test_prompts_and_steps_are_those_of_the_modules(name: str) -> None:
    model = variant(name)
    tokens = some_tokens(40, 1)  # more than windows see
    assert_follows(decoder_for(model, 40), tokens[0], logits_of(model, tokens)[0], 23)


@pytest.mark.parametrize("name", ["gemma2", "bloom", "falcon, ALiBi"])
def test_scores_are_changed_in_all_spans_of_a_long_text(name: str) -> None:
    model = variant(name, num_hidden_layers=2, max_position_embeddings=300, sliding_window=150)
    if name != "gemma2":
        del model.config.sliding_window
    else:  # scores far beyond their bound
        model.model.layers[1].self_attn.q_proj.weight.data *= 64.0
    tokens = some_tokens(300, 1)
    wanted = logits_of(model, tokens)[0]
    assert_follows(decoder_for(model, 300), tokens[0], wanted, 297)
    fast = decoder_for(model, 300, arithmetic="fast")
    assert_follows(fast, tokens[0], wanted, 297, FAST_TOLERANCE)


@pytest.mark.parametrize(
    "name", ["gemma2", "phi3", "gpt2", "neox_parallel", "bloom", "falcon_new", "falcon_alibi"]
)
def test_packed_models_decode_as_they_compute(name: str, packed: Packed) -> None:
    model: Any = load(packed(name, "rtn"), dtype=torch.float32)[0]
    model.generation_config.eos_token_id = None
    tokens = some_tokens(24, 1)
    wanted = logits_of(model, tokens)[0]
    assert_follows(decoder_for(model, 24), tokens[0], wanted, 13)
    fast = decoder_for(model, 24, arithmetic="fast")
    assert_follows(fast, tokens[0], wanted, 13, FAST_TOLERANCE)
    options = {"max_new_tokens": 20, "do_sample": False}
    found = model.generate(tokens[:, :9], **options)
    assert model.generate._kept is not None  # natively
    assert torch.equal(found, type(model).generate(model, tokens[:, :9], **options))


@pytest.mark.parametrize("name", ["olmo2", "glm4"])
def test_greedy_text_is_that_of_the_modules(name: str) -> None:
    model = variant(name)
    model.generation_config.eos_token_id = None
    model.generate = Generate(model)
    options = {"max_new_tokens": 20, "do_sample": False}
    found = model.generate(some_tokens(9, 1), **options)
    assert model.generate._kept is not None
    assert torch.equal(found, type(model).generate(model, some_tokens(9, 1), **options))


def _sdpa(model: Any) -> None:
    model.config._attn_implementation = "sdpa"


def _eager(model: Any) -> None:
    model.config._attn_implementation = "eager"


def _exact(model: Any) -> None:
    mlp = model.transformer.h[1].mlp
    mlp.pretraining_tp, mlp.slow_but_exact = 2, True


def _beta(model: Any) -> None:
    model.transformer.h[1].self_attention.beta = 0.5


def _drops(model: Any) -> None:
    model.transformer.h[1].attn.resid_dropout.train()


def _gated(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.gate_up_proj = nn.Linear(64, 191).eval()


def _no_bound(model: Any) -> None:
    model.config.final_logit_softcapping = 0.0


@pytest.mark.parametrize(
    ("name", "change", "changes", "reason"),
    [
        ("gemma2", _sdpa, {}, "scores are capped, by 'sdpa' attention"),
        ("gemma2", _no_bound, {}, r"logits are capped by 0\.0"),
        ("gemma3, logits", None, {"attn_logit_softcapping": 50.0}, "scores are capped"),
        ("phi3", _gated, {}, "a fused matrix of 191 outputs has no halves"),
        ("glm4", None, {"sliding_window": 9}, "masks and cache of a glm4"),
        ("gpt2", _drops, {}, "resid_dropout is in training mode"),
        ("gpt2", None, {"add_cross_attention": True}, "differs in crossattention, ln_cross_attn"),
        ("gpt2", None, {"n_positions": 30}, "fewer than 32 positions"),
        (
            "bloom",
            None,
            {"apply_residual_connection_post_layernorm": True},
            "added to the residual",
        ),
        ("bloom", _exact, {}, "slow_but_exact"),
        ("bloom", _beta, {}, "biases of scores are scaled"),
        ("falcon, ALiBi", _eager, {}, "attention with ALiBi is not 'sdpa'"),
        ("falcon, one norm", None, {"parallel_attn": False}, "are not parallel"),
        ("falcon, every head", None, {"num_kv_heads": 1}, "1 heads of keys, not 2"),
    ],
)
def test_refusals(name: str, change: Any, changes: dict[str, Any], reason: str) -> None:
    model = variant(name, **changes)
    if change is not None:
        change(model)
    with pytest.raises(BackendUnavailable, match=reason):
        decoder_for(model, 32)


def test_other_types_are_refused() -> None:
    model = random_model(AutoConfig.for_model("olmo", **ROPE, num_hidden_layers=1))
    with pytest.raises(BackendUnavailable, match="there is none for model type 'olmo'"):
        decoder_for(model, 8)


def test_slices_of_fused_matrices() -> None:
    order = torch.arange(2 * (3 + 2) * 4).view(2, 5, 4)  # two heads of keys, three queries each
    grouped = Heads(6, 2, 4, grouped=True).slices(40)
    wanted = order[:, :3], order[:, 3], order[:, 4]
    for part, outputs in zip(grouped, wanted, strict=True):
        assert torch.equal(part.indices(), outputs.flatten())
    stacked = [part.indices() for part in Heads(6, 2, 4).slices(40)]
    assert torch.equal(torch.cat(stacked), torch.arange(40))
    assert [len(part) for part in stacked] == [24, 8, 8]
    for heads in (Heads(6, 2, 4), Heads(5, 2, 4)):
        with pytest.raises(BackendUnavailable, match=r"36 outputs does not have \d and 2 heads"):
            heads.slices(36)


@pytest.mark.parametrize(
    "part", [Slice(65, 64, 64, 1), Slice(0, 32, 97, 2), Slice(0, 64, 64, 0), Slice(0, 8, 8, 4)]
)
def test_slices_are_checked_natively(part: Slice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Heads, "slices", lambda heads, outputs: (part, part, part))
    with pytest.raises(BackendUnavailable, match="the shape of q does not fit"):
        decoder_for(variant("phi3"), 8)


def test_bounds_are_checked_natively() -> None:
    native = backend.native()
    assert native is not None
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="scores are capped by what is not above 0"):
            native.Scoring(window=None, cap=bad, bias=None)
