"""The native decoder against the modules of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from quantine import Calibration, Plan, load, quantize
from quantine.core.arithmetic import ARITHMETICS, Arithmetic
from quantine.errors import BackendUnavailable
from quantine.kernels import backend
from quantine.runtime.decoder import Decoder, decoder_for
from quantine.runtime.decoder_model import arguments_for
from quantine.runtime.generate import continue_tokens
from quantine.runtime.packed import packed_modules
from quantine.runtime.sampling import Sampling
from tiny_models import VOCAB, WIDTH, logits_of, random_model, some_tokens, tiny_config

Packed = Callable[[str, str], Path]

NATIVE: Final = (
    "llama",
    "llama_tied",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma3",
    "opt",
)
TOLERANCE: Final = 1e-4
"""Of logits, relative to the largest of a row."""
FAST_TOLERANCE: Final = 1e-3
"""Likewise, in fast arithmetic, where keys and values are rounded to 16 bits too."""
LONG: Final = 600
"""Tokens whose attention takes several of its spans of 128."""


def tiny_model(name: str, **changes: Any) -> Any:
    return random_model(tiny_config(name, **changes))


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def assert_follows(
    decoder: Decoder, tokens: Tensor, wanted: Tensor, prompt: int, tolerance: float = TOLERANCE
) -> None:
    """A prompt, then token by token: logits are those ``wanted`` ``[tokens, vocabulary]``."""
    assert_close(decoder.append(tokens[:prompt]), wanted[prompt - 1], tolerance)
    for place in range(prompt, len(tokens)):
        assert decoder.position == place
        assert_close(decoder.append(tokens[place : place + 1]), wanted[place], tolerance)


@pytest.mark.parametrize("name", NATIVE)
def test_prompts_and_steps_are_those_of_the_modules(name: str) -> None:
    model = tiny_model(name)
    tokens = some_tokens(70, 1)
    wanted = logits_of(model, tokens)[0]
    decoder = decoder_for(model, 70)
    for prompt in (1, 7, 16, 17, 64, 65):  # around the tokens that attend, or are computed, at once
        decoder.reset()
        assert_follows(decoder, tokens[0], wanted, prompt)


@pytest.mark.parametrize("kind", ["rtn", "mixed"])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "gemma3", "opt"])
def test_packed_models_decode_as_they_compute(name: str, kind: str, packed: Packed) -> None:
    directory = packed(name, kind)
    model, _ = load(directory, dtype=torch.float32)
    tokens = some_tokens(24, 1)
    wanted = logits_of(model, tokens)[0]
    assert_follows(decoder_for(model, 24), tokens[0], wanted, 11)
    named = decoder_for(model, 24, arithmetic="fast")
    assert_follows(named, tokens[0], wanted, 11, FAST_TOLERANCE)
    named.reset()
    found = decoder_for(load(directory, torch.float32, "fast")[0], 24)
    assert torch.equal(found.append(tokens[0]), named.append(tokens[0]))


def quantized(tiny: Path, out: Path, rules: list[dict[str, Any]], text: Calibration) -> Any:
    plan = Plan.from_dict({"rules": rules, "arithmetic": "exact"})
    quantize(tiny, out, plan, text)
    return load(out, dtype=torch.float32)[0]


OUTPUTS: Final[dict[str, Any]] = {"group_axis": "out"}


@pytest.mark.parametrize(
    "rules",
    [
        [
            {"match": "@embedding", "method": "rtn", "bits": 8, "group_size": -1, **OUTPUTS},
            {"match": "*.q_proj", "method": "gptq", "bits": 4, "group_size": 32},
            {"match": "*.v_proj", "method": "rtn", "bits": 4, "group_size": 8, **OUTPUTS},
            {"match": "@blocks", "method": "spqr", "bits": 4, "outliers": 0.02, **OUTPUTS},
        ],
        [{"match": "@blocks", "method": "adadim", "inner": "rtn", "group_size": 32}],
    ],
    ids=["mixed", "adadim"],
)
@pytest.mark.parametrize("name", ["llama_tied", "opt"])
def test_groups_along_outputs_decode_as_they_compute(
    name: str,
    rules: list[dict[str, Any]],
    tiny: Callable[[str], Path],
    short: Calibration,
    tmp_path: Path,
) -> None:
    model = quantized(tiny(name), tmp_path / "out", rules, short)
    axes = {module.spec.group_axis for _, module in packed_modules(model)}
    assert axes == {"in", "out"}
    tokens = some_tokens(24, 1)
    wanted = logits_of(model, tokens)[0]
    assert_follows(decoder_for(model, 24), tokens[0], wanted, 11)
    fast = decoder_for(model, 24, arithmetic="fast")
    assert_follows(fast, tokens[0], wanted, 11, FAST_TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "mistral", "opt"])
def test_fast_arithmetic_stays_close(name: str) -> None:
    changes: dict[str, Any] = {"max_position_embeddings": 400}
    if name == "mistral":
        changes["sliding_window"] = 150
    model = tiny_model(name, **changes)
    tokens = some_tokens(400, 1)
    wanted = logits_of(model, tokens)[0]
    decoder = decoder_for(
        model, 400, arithmetic="fast"
    )  # float matrices: only its cache is rounded
    assert_follows(decoder, tokens[0], wanted, 380, FAST_TOLERANCE)


@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3", "opt"])
def test_packed_tables_decode_as_they_compute(
    name: str, bits: int, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = Plan.preset("rtn", group_size=32, arithmetic="exact").with_head(bits)
    quantize(tiny(name), tmp_path / "out", plan, Calibration(samples=0))
    model, _ = load(tmp_path / "out", dtype=torch.float32)
    native = backend.native()
    assert native is not None
    arguments = arguments_for(model, native, 24)
    table = model.get_input_embeddings()
    assert arguments["embedding"] is table.matrix()
    assert arguments["embedding"].nbytes < table.out_features * table.in_features * 1.25
    tokens = some_tokens(24, 1)
    wanted = logits_of(model, tokens)[0]
    assert_follows(decoder_for(model, 24), tokens[0], wanted, 11)
    fast = decoder_for(model, 24, arithmetic="fast")
    assert_follows(fast, tokens[0], wanted, 11, FAST_TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "mistral", "opt"])
def test_long_contexts(name: str) -> None:
    changes: dict[str, Any] = {"max_position_embeddings": LONG}
    if name == "mistral":
        changes["sliding_window"] = 300  # begins inside of a span, and leaves whole ones behind
    model = tiny_model(name, **changes)
    tokens = some_tokens(LONG, 1)
    assert_follows(decoder_for(model, LONG), tokens[0], logits_of(model, tokens)[0], LONG - 20)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 1, "num_attention_heads": 16},  # more heads than go together
        {"num_key_value_heads": 4, "head_dim": 6},
        {"attention_bias": True, "mlp_bias": True},
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "relu"},
        {"rms_norm_eps": 0.1},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ],
    ids=lambda changes: ",".join(changes),
)
def test_variants_of_llama(changes: dict[str, Any]) -> None:
    model = tiny_model("llama", **changes)
    tokens = some_tokens(60, 1)
    assert_follows(decoder_for(model, 60), tokens[0], logits_of(model, tokens)[0], 50)


@pytest.mark.parametrize(
    "changes",
    [{"enable_bias": False}, {"layer_norm_elementwise_affine": False}],
    ids=lambda changes: ",".join(changes),
)
def test_variants_of_opt(changes: dict[str, Any]) -> None:
    model = tiny_model("opt", **changes)
    tokens = some_tokens(20, 1)
    assert_follows(decoder_for(model, 20), tokens[0], logits_of(model, tokens)[0], 9)


def test_extreme_attention_scores() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    for layer in model.model.layers:  # scores in the thousands: one token takes everything
        layer.self_attn.q_proj.weight.data *= 64.0
        layer.self_attn.k_proj.weight.data *= 64.0
    tokens = some_tokens(90, 1)
    assert_follows(decoder_for(model, 90), tokens[0], logits_of(model, tokens)[0], 80)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_threads_change_no_bit(name: str, arithmetic: Arithmetic) -> None:
    model = tiny_model(name, max_position_embeddings=LONG)
    tokens = some_tokens(LONG, 1)[0]
    found = []
    for threads in (1, 2, 3):
        decoder = decoder_for(model, LONG, arithmetic=arithmetic, threads=threads)
        found.append([decoder.append(part).clone() for part in tokens.split([590, 9, 1])])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_full_decoder_says_so_and_stays_as_it_is() -> None:
    model = tiny_model("llama")
    tokens = some_tokens(20, 1)
    decoder = decoder_for(model, 20)
    decoder.append(tokens[0, :19])
    with pytest.raises(ValueError, match="no room for 2 more tokens: 19 of 20 places are taken"):
        decoder.append(tokens[0, :2])
    assert_close(decoder.append(tokens[0, 19:]), logits_of(model, tokens)[0, -1])
    assert decoder.position == decoder.capacity == 20
    with pytest.raises(ValueError, match="no room for 1 more"):
        decoder.append(tokens[0, :1])
    decoder.reset()
    assert_close(decoder.append(tokens[0]), logits_of(model, tokens)[0, -1])


def test_tokens_are_checked() -> None:
    decoder = decoder_for(tiny_model("llama"), 8)
    for bad in (VOCAB, -1):
        with pytest.raises(ValueError, match=f"token {bad} is not below {VOCAB}"):
            decoder.append(torch.tensor([3, bad]))
    with pytest.raises(ValueError, match="there are no tokens"):
        decoder.append(torch.tensor([], dtype=torch.long))
    assert decoder.position == 0


def test_angles_that_change_with_the_length_are_followed_until_they_do() -> None:
    halves = tiny_model("phi3").model.rotary_emb.inv_freq.numel()
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + n / 8 for n in range(halves)],
        "long_factor": [3.0 + n for n in range(halves)],
    }
    model = tiny_model("phi3", original_max_position_embeddings=40, rope_parameters=rope)
    tokens = some_tokens(60, 1)
    logits_of(model, tokens)  # with the other angles, which the model then keeps
    short = tokens[:, :40]
    assert_follows(decoder_for(model, 40), short[0], logits_of(model, short)[0], 30)
    with pytest.raises(BackendUnavailable, match="'longrope' change after 40 tokens"):
        decoder_for(model, 41)


ROPE_DYNAMIC: Final = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gemma3", {"use_bidirectional_attention": True}, "looks ahead"),
        ("opt_projected", {}, "norms come after"),
        ("opt_projected", {"do_layer_norm_before": True}, "project_in"),
        ("opt", {"_remove_final_layer_norm": True}, "final_layer_norm"),
        ("opt", {"max_position_embeddings": 30}, "fewer than 32 positions"),
        ("opt", {"activation_function": "tanh"}, "activation is a Tanh"),
        ("llama", {"rope_parameters": ROPE_DYNAMIC}, "'dynamic'"),
    ],
)
def test_refusals(name: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(BackendUnavailable, match=reason):
        decoder_for(tiny_model(name, **changes), 32)


def test_refusals_of_changed_models(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").train()
    with pytest.raises(BackendUnavailable, match="training"):
        decoder_for(model, 8)
    model.eval()
    hook = model.model.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(BackendUnavailable, match=r"model\.norm has hooks"):
        decoder_for(model, 8)
    hook.remove()
    decoder_for(model, 8)
    attention = model.model.layers[1].self_attn
    attention.rescale = torch.nn.Identity().eval()
    with pytest.raises(BackendUnavailable, match=r"attention .* differs in rescale"):
        decoder_for(model, 8)
    del attention.rescale
    attention.q_proj = torch.nn.Sequential(attention.q_proj).eval()
    with pytest.raises(BackendUnavailable, match="a matrix is in a Sequential"):
        decoder_for(model, 8)
    monkeypatch.setattr(backend, "native", lambda: None)
    with pytest.raises(BackendUnavailable, match="extension"):
        decoder_for(model, 8)


@pytest.mark.parametrize("name", ["llama_tied", "opt"])
def test_greedy_continuation_is_that_of_generate(name: str) -> None:
    model = tiny_model(name)
    model.generation_config.eos_token_id = None
    tokens = some_tokens(9, 1)
    wanted = model.generate(tokens, max_new_tokens=20, do_sample=False)[0, 9:].tolist()
    decoder = decoder_for(model, 29)
    assert list(continue_tokens(model, tokens, 20, Sampling(), decoder)) == wanted
    assert decoder.position == 28


ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    native = backend.native()
    assert native is not None
    near = torch.linspace(-12.0, 12.0, 4001)
    far = torch.tensor([0.0, 1e-30, -1e-30, 60.0, -60.0, 88.0, -88.0, 1e4, -1e4, 1e12, -1e12])
    x = torch.cat([near, far])
    wanted = ACTIVATIONS[name](x.double())
    found = x.clone()
    native.activate(name, found)
    # The exponent of e^-u carries the rounding of u: a few units in the last place times u.
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert ((found - wanted).abs() <= 4e-6 * wanted.abs() + 1e-7).all()
    odd = torch.tensor([math.nan, math.inf])
    native.activate(name, odd)
    assert odd[0].isnan()
    assert odd[1] == math.inf
    low = torch.tensor([-1e30, -3e38, -math.inf])
    wanted = ACTIVATIONS[name](low)
    native.activate(name, low)
    torch.testing.assert_close(low, wanted, rtol=0, atol=0, equal_nan=True)


def test_shapes_are_checked_natively() -> None:
    native = backend.native()
    assert native is not None
    model = tiny_model("llama")
    model.model.norm.weight.data = torch.ones(WIDTH - 1)
    with pytest.raises(BackendUnavailable, match="the shape of a norm does not fit"):
        decoder_for(model, 8)
    model.model.norm.weight.data = torch.ones(WIDTH)
    model.lm_head = torch.nn.Linear(WIDTH, VOCAB - 1).eval()
    with pytest.raises(BackendUnavailable, match="the shape of the head does not fit"):
        decoder_for(model, 8)
