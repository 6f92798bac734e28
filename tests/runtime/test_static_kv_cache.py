"""The packed cache whose memory never moves, against the one that grows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compiled import OPERATOR, compiled, overload
from test_graph_decoder import decoded, recorded, replayed
from test_hf_generate import Heard
from torch import Tensor
from transformers import CompileConfig

import quantine
from other_device import no_extension
from quantine import Calibration, Plan, quantize
from quantine.kernels import backend
from quantine.runtime.generate import ModuleDecoder
from quantine.runtime.graph_decoder import StaticDecoder
from quantine.runtime.kv_cache import (
    BLOCK,
    PackedLayer,
    StaticPackedLayer,
    packed_cache,
    static_cache,
)
from tiny_models import biased_keys, loud_states, some_tokens

Rounding = Callable[[str], Any]
UNEVEN = "W16A3KV-rotated-mixed"
CENTRED = "W16A4KV-mixed-centred"
SCHEMES = ("W4A8", "W4A4KV", "W3A3KV", "W16A8KV", UNEVEN, CENTRED)
MADE = {UNEVEN: loud_states, CENTRED: biased_keys}


@pytest.fixture(scope="module")
def rounding(
    tiny: Callable[[str], Path], short: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Rounding:
    root = tmp_path_factory.mktemp("static")

    def loaded(scheme: str) -> Any:
        out = root / scheme
        if not out.exists():
            model = MADE[scheme](root / "made" / scheme) if scheme in MADE else tiny("llama")
            quantize(model, out, Plan.scheme(scheme, arithmetic="exact"), short)
        return quantine.load(out, torch.float32)[0]

    return loaded


@torch.no_grad()
def logits_with(cache: Any, call: Callable[..., Any], tokens: Tensor, parts: list[int]) -> Tensor:
    found = [call(input_ids=x, past_key_values=cache).logits for x in tokens.split(parts, 1)]
    return torch.cat(found, 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_repeated_step_computes_what_the_modules_do(scheme: str, rounding: Rounding) -> None:
    model = rounding(scheme)
    decoder, usual = StaticDecoder(model, BLOCK + 9, replayed), ModuleDecoder(model)
    for prompt in (some_tokens(BLOCK + 4, 1)[0], some_tokens(1, 1)[0]):
        pairs = zip(decoded(decoder, prompt, 6), decoded(usual, prompt, 6), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["W16A3KV", UNEVEN, CENTRED])
def test_what_a_graph_holds_of_a_step_computes_it_again(scheme: str, rounding: Rounding) -> None:
    model = rounding(scheme)
    with no_extension():  # whose products are no operators
        decoder, usual = StaticDecoder(model, 16, recorded), ModuleDecoder(model)
        prompt = some_tokens(9, 1)[0]
        pairs = zip(decoded(decoder, prompt, 5), decoded(usual, prompt, 5), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_several_texts_fill_it_to_the_end(bits: int, rounding: Rounding) -> None:
    model = rounding(f"W16A{bits}KV")
    tokens, parts = some_tokens(BLOCK + 6, 2), [BLOCK + 2, 1, 1, 2]
    expected = logits_with(packed_cache(model), model, tokens, parts)
    cache = static_cache(model, tokens.shape[1])
    found = logits_with(cache, model, tokens, parts)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert all(isinstance(layer, StaticPackedLayer) for layer in cache.layers)
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(ValueError, match="1 tokens after 70, in a cache with room for 70"):
        logits_with(cache, model, tokens[:, :1], [1])
    assert all(torch.equal(a, b.keys) for a, b in zip(before, cache.layers, strict=True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_holds_operators(backend: str, rounding: Rounding) -> None:
    model, parts = rounding("W4A4KV"), [9, 1, 1, 1]
    tokens = some_tokens(12, 1)
    expected = logits_with(static_cache(model, 12), model, tokens, parts)
    torch._dynamo.reset()
    whole, operators = compiled(model, backend)

    def step(**inputs: Any) -> Any:
        return (whole if inputs["input_ids"].shape[1] == 1 else model)(**inputs)

    found = logits_with(static_cache(model, 12), step, tokens, parts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    names = [str(overload(target)) for target in operators]
    layers = model.config.num_hidden_layers
    assert sum("attend_packed" in name for name in names) % layers == 0
    for part in ("attend_packed", "pack_states", str(OPERATOR)):
        assert sum(part in name for name in names) >= layers, part


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}],
    ids=lambda options: ",".join(options) or "greedy",
)
def test_generate_takes_it_where_a_static_cache_is_asked_for(
    options: dict[str, Any], rounding: Rounding
) -> None:
    model, tokens = rounding("W16A4KV"), some_tokens(9, 2)
    model.generation_config.eos_token_id = None
    found = []
    for asked in ({}, {"cache_implementation": "static"}):
        torch.manual_seed(5)
        out = model.generate(
            tokens, max_new_tokens=6, return_dict_in_generate=True, **asked, **options
        )
        found.append(out)
    growing, static = (out.past_key_values for out in found)
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert all(isinstance(layer, StaticPackedLayer) for layer in static.layers)
    assert all(isinstance(layer, PackedLayer) for layer in growing.layers)
    assert static.layers[0].keys.dtype == torch.uint8


@pytest.mark.parametrize("scheme", ["W4A4KV", UNEVEN, CENTRED])
def test_generate_compiles_models_that_round(scheme: str, rounding: Rounding) -> None:
    model, tokens = rounding(scheme), some_tokens(9, 1)
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    options["cache_implementation"] = "static"
    expected = model.generate(tokens, **options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    everywhere = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    everywhere._compile_all_devices = True
    assert torch.equal(model.generate(tokens, compile_config=everywhere, **options), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_configuration_asks_for_it_and_streamers_hear_it(rounding: Rounding) -> None:
    model, tokens = rounding("W16A4KV"), some_tokens(9, 1)
    wanted = type(model).generate(model, tokens, max_new_tokens=4, do_sample=False)
    config = copy.deepcopy(model.generation_config)
    config.cache_implementation, config.max_new_tokens, config.do_sample = "static", 4, False
    heard = Heard()
    assert torch.equal(model.generate(tokens, config, streamer=heard), wanted)
    assert [token for part in heard.parts for token in part] == wanted[0].tolist()
    assert heard.ended == 1


def test_programs_of_gpus_append_and_attend(
    rounding: Rounding, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    model, tokens, parts = rounding("W16A4KV"), some_tokens(4, 2), [3, 1]
    monkeypatch.setattr(backend, "of", lambda *_: "triton")
    expected = logits_with(packed_cache(model), model, tokens, parts)
    cache = static_cache(model, 5)
    found = logits_with(cache, model, tokens, parts)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    cache = static_cache(model, 2)
    with pytest.raises(RuntimeError, match="more tokens than room for 2"):  # the device asserts
        logits_with(cache, model, tokens[:, :3], [3])
