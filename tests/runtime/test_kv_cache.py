"""The packed cache against the cache of floats."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

import quantine
from quantine import Calibration, Plan, quantize
from quantine.activations.grids import StaticGrid
from quantine.activations.modules import AttentionSites
from quantine.eval.memory import cache_bytes
from quantine.kernels.bits.reference import packed_bytes
from quantine.kernels.kv_attention.packed_states import PackedStates
from quantine.kernels.kv_attention.packing import pack_states, pack_states_reference
from quantine.rptq.feedback import feedback_of
from quantine.runtime.kv_cache import BLOCK, Grids, PackedLayer, StaticPackedLayer, packed_cache
from tiny_models import biased_keys, byte_tokenizer, loud_states

TEXT = "Line 33: 22 apples and 10 pears.\nLine 34"


def grid_of(bits: int, channels: int, seed: int, heads: int = 0) -> StaticGrid:
    """With feedback inside ``heads``, if there are any."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (channels,), generator=generator)
    scale = torch.rand(5, generator=generator) + 0.01
    zero = torch.randint(-20, 40, (5,), generator=generator).float()
    if not heads:
        return StaticGrid(bits, scale, zero, labels.int())
    rows = torch.randn(heads, 50, channels // heads, generator=generator)
    feedback = feedback_of(rows.transpose(1, 2) @ rows)
    return StaticGrid(bits, scale, zero, labels.int(), feedback)


@given(
    bits=st.integers(2, 8),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    tokens=st.sampled_from([1, 2, 5, 130]),
    dim=st.sampled_from([1, 3, 8, 17, 64]),
    fed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_packed_states_are_what_the_grid_gives_back(
    bits: int, batch: int, heads: int, tokens: int, dim: int, fed: bool, seed: int
) -> None:
    grid = grid_of(bits, heads * dim, seed, heads if fed else 0)
    states = torch.randn(batch, heads, tokens, dim) * 10
    flat = grid(states.transpose(1, 2).flatten(2))
    expected = flat.view(batch, tokens, heads, dim).transpose(1, 2)
    scale, zero = (value.view(heads, dim) for value in grid.of_channels())
    room = torch.zeros(batch, heads, tokens + 2, packed_bytes(dim, bits), dtype=torch.uint8)
    packed = room[:, :, 1:-1]
    pack_states(states, bits, scale, zero, packed, grid.fed())
    expected_codes = pack_states_reference(states, bits, scale, zero, grid.fed())
    assert torch.equal(packed, expected_codes)
    assert not room[:, :, 0].any()
    assert not room[:, :, -1].any()
    assert torch.equal(PackedStates(packed, bits, scale, zero, torch.float32), expected)
    # Attention rounds once more what the cache gives back: nothing changes.
    assert torch.equal(grid(flat), flat)


def layer_of(bits: int, heads: int, dim: int) -> PackedLayer:
    return PackedLayer(Grids(grid_of(bits, heads * dim, 0, heads), grid_of(bits, heads * dim, 1)))


@given(
    bits=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 100)),
            st.tuples(st.just("crop"), st.integers(1, 70)),
            st.tuples(st.just("reorder"), st.integers(0, 9)),
            st.tuples(st.just("repeat"), st.integers(1, 2)),
            st.tuples(st.just("select"), st.integers(0, 2)),
            st.tuples(st.just("copy"), st.just(0)),
        ),
        max_size=8,
    ),
)
@torch.no_grad()
def test_it_holds_what_a_cache_of_floats_holds(
    bits: tuple[int, int], steps: list[tuple[str, int]]
) -> None:
    heads, dim = 2, 5
    grids = grid_of(bits[0], heads * dim, 0), grid_of(bits[1], heads * dim, 1)
    packed, floats = PackedLayer(Grids(*grids)), DynamicLayer()
    batch = 2
    for what, n in [("add", 1), *steps, ("add", 1)]:
        if what == "add":
            states = [torch.randn(batch, heads, n, dim) * 10 for _ in grids]
            found = packed.update(*states)
            rounded = [
                grid(x.transpose(1, 2).flatten(2)).view(batch, n, heads, dim).transpose(1, 2)
                for grid, x in zip(grids, states, strict=True)
            ]
            expected = floats.update(*rounded)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        elif what == "copy":
            before = packed
            packed = copy.deepcopy(packed)
            before.update(*(torch.full((batch, heads, 1, dim), 99.0) for _ in grids))
        else:
            for layer in (packed, floats):
                if what == "crop":
                    layer.crop(-min(n, layer.get_seq_length() - 1))
                elif what == "reorder":
                    order = torch.randperm(batch, generator=torch.Generator().manual_seed(n))
                    layer.reorder_cache(order)
                elif what == "repeat":
                    layer.batch_repeat_interleave(n)
                else:
                    layer.batch_select_indices(torch.arange(batch)[: n + 1])
            batch = len(floats.keys)
        assert packed.get_seq_length() == floats.get_seq_length()


@pytest.mark.parametrize("tokens", [4096, 4097])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_bytes_at_a_long_context_are_those_of_the_codes(bits: int, tokens: int) -> None:
    layer = layer_of(bits, 3, 64)
    states = torch.randn(1, 3, tokens, 64)
    for part in states.split(1000, 2):
        layer.update(part, part)
    half = 2 * states.numel() * 2
    assert layer.nbytes == pytest.approx(half * bits / 16, rel=0.02)
    assert layer.nbytes == layer.keys.untyped_storage().nbytes() * 2
    assert layer.statistics_nbytes == 2 * 2 * 3 * 64 * 4


def test_a_token_needs_no_new_memory_until_a_block_is_full() -> None:
    layer = layer_of(4, 2, 16)
    token = torch.randn(3, 2, 1, 16)
    places = []
    for _ in range(2 * BLOCK):
        layer.update(token, token)
        places.append((layer.keys.data_ptr(), layer.values.data_ptr()))
    assert places.count(places[0]) == BLOCK
    assert places.count(places[-1]) == BLOCK
    layer.reset()
    assert layer.nbytes == 0
    assert layer.get_seq_length() == 0


UNEVEN = "W16A3KV-rotated-mixed"
"""Keys with channels of different bits, and values with factors of tokens."""
CENTRED = "W16A4KV-mixed-centred"
"""Keys that are less a centre, which turns."""
MADE = {UNEVEN: loud_states, CENTRED: biased_keys}
"""How the models of these schemes are made."""


@pytest.fixture(scope="module")
def rounding(
    tiny: Callable[[str], Path], short: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Any]:
    root = tmp_path_factory.mktemp("kv")

    def loaded(name: str, scheme: str) -> Any:
        out = root / f"{name}-{scheme}"
        if not out.exists():
            model = MADE[scheme](root / "made" / scheme) if scheme in MADE else tiny(name)
            quantize(model, out, Plan.scheme(scheme, arithmetic="exact"), short)
        return quantine.load(out)[0]

    return loaded


def tokens_of(*texts: str) -> Tensor:
    return torch.tensor([byte_tokenizer()(text).input_ids for text in texts])


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("llama", "W16A4KV"),
        ("opt", "W16A3KV"),
        ("gemma2", "W16A8KV"),
        ("llama", UNEVEN),
        ("qwen2", CENTRED),
    ],
)
@torch.no_grad()
def test_token_by_token_it_is_the_whole_text(
    name: str, scheme: str, rounding: Callable[[str, str], Any]
) -> None:
    model = rounding(name, scheme)
    tokens = tokens_of(TEXT, TEXT[::-1])
    whole = model(input_ids=tokens).logits
    cache = packed_cache(model)
    parts = [
        model(input_ids=part, past_key_values=cache).logits
        for part in tokens.split([9, 1, 1, 30], 1)
    ]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4 * float(whole.abs().max()))
    assert cache is not None
    assert cache.get_seq_length() == tokens.shape[1]
    stored = sum(layer.nbytes for layer in cache.layers)
    held = len(tokens) * -(-tokens.shape[1] // BLOCK) * BLOCK
    bits, heads = int(scheme[4]), model.config.num_key_value_heads if name != "opt" else 0
    sites = [m for m in model.modules() if isinstance(m, AttentionSites)]
    factors = sum(site.value.head_reached() is not None for site in sites)
    expected = cache_bytes(model.config, held) * bits / 16 + factors * held * heads * 2
    assert stored == expected
    assert scheme != UNEVEN or (factors and any(site.key.uneven() is not None for site in sites))


@pytest.mark.parametrize("scheme", ["W16A4KV", UNEVEN, CENTRED])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_generation_is_that_of_rounded_floats(
    scheme: str, options: dict[str, int], rounding: Callable[[str, str], Any]
) -> None:
    model = rounding("llama", scheme)
    tokens = tokens_of(TEXT[:12], TEXT[3:15])
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    mask = torch.ones_like(tokens)
    packed = model.generate(tokens, attention_mask=mask, **asked)
    floats = DynamicCache(config=model.config)
    expected = model.generate(tokens, attention_mask=mask, past_key_values=floats, **asked)
    assert torch.equal(packed, expected)


@torch.no_grad()
def test_centred_keys_lose_less(tmp_path: Path, short: Calibration) -> None:
    source = biased_keys(tmp_path / "model")
    tokens = tokens_of(TEXT, TEXT[::-1])
    exact = AutoModelForCausalLM.from_pretrained(source)(input_ids=tokens).logits.log_softmax(-1)
    lost = []
    for scheme in ("W16A4KV-mixed", CENTRED):
        quantize(source, tmp_path / scheme, Plan.scheme(scheme, arithmetic="exact"), short)
        model, _ = quantine.load(tmp_path / scheme)
        found = model(input_ids=tokens).logits.log_softmax(-1)
        lost.append(float((exact.exp() * (exact - found)).sum(-1).mean()))
    assert lost[1] < lost[0] / 2


@torch.no_grad()
def test_positions_of_centred_keys_begin_behind_padding(
    rounding: Callable[[str, str], Any],
) -> None:
    model = rounding("qwen2", CENTRED)
    texts = tokens_of(TEXT[:20])[0], tokens_of(TEXT[4:15])[0]
    room = max(map(len, texts))
    padded, mask = (
        torch.stack([torch.cat([row.new_zeros(room - len(row)), row]) for row in rows])
        for rows in (texts, [torch.ones_like(text) for text in texts])
    )
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(padded, attention_mask=mask, **asked)
    alone = [
        model.generate(text[None], attention_mask=torch.ones(1, len(text)), **asked)
        for text in texts
    ]
    assert [row[-6:].tolist() for row in found] == [row[0, -6:].tolist() for row in alone]
    # Without a mask, transformers takes it from what looks like padding.
    assert torch.equal(model.generate(padded, **asked), found)
    with pytest.raises(RuntimeError, match="without padding before them"):
        model.generate(padded, attention_mask=mask, past_key_values=packed_cache(model), **asked)


@torch.no_grad()
def test_centred_keys_go_on_behind_padding(rounding: Callable[[str, str], Any]) -> None:
    model = rounding("qwen2", CENTRED)
    text, more, room = tokens_of(TEXT[:12]), tokens_of(TEXT[12:15]), 7
    length = text.shape[1]
    expected = model(input_ids=torch.cat([text, more], 1)).logits[:, length:]
    mask = torch.cat([torch.ones_like(text), text.new_zeros(1, room)], 1)
    padded = torch.cat([text, text.new_zeros(1, room)], 1)
    cache = DynamicCache(config=model.config)
    model(input_ids=padded, attention_mask=mask, past_key_values=cache)
    mask = torch.cat([mask, torch.ones_like(more)], 1)
    positions = length + torch.arange(more.shape[1])[None]
    found = model(
        input_ids=more, attention_mask=mask, position_ids=positions, past_key_values=cache
    ).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize("scheme", ["W16A4KV", UNEVEN])
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 6},
        {"max_length": 18, "num_beams": 2},
        {"max_new_tokens": 3, "max_cache_len": 40},
        {},
    ],
)
def test_a_static_cache_that_is_asked_for_is_packed(
    scheme: str,
    options: dict[str, int],
    rounding: Callable[[str, str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = rounding("llama", scheme)
    tokens = tokens_of(TEXT[:12], TEXT[3:15])
    asked = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(tokens, **asked, **options)
    monkeypatch.setattr(model.generation_config, "cache_implementation", "static")
    found = model.generate(tokens, return_dict_in_generate=True, **asked, **options)
    assert torch.equal(found.sequences, expected)
    layers = found.past_key_values.layers
    assert {type(layer) for layer in layers} == {StaticPackedLayer}
    room = options.get("max_cache_len", expected.shape[1])
    assert {layer.max_cache_len for layer in layers} == {room}
    assert model.generation_config.cache_implementation == "static"


def test_guessed_tokens_are_not_taken_back_from_a_static_cache(
    rounding: Callable[[str, str], Any],
) -> None:
    asked = {"prompt_lookup_num_tokens": 3, "cache_implementation": "static", "max_new_tokens": 4}
    with pytest.raises(ValueError, match="assisted generate is not supported with Static cache"):
        rounding("llama", "W16A4KV").generate(tokens_of(TEXT[:12]), do_sample=False, **asked)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, PackedLayer),
        ({"cache_implementation": "hybrid"}, PackedLayer),  # in the files of Gemma 2
        ({"cache_implementation": "dynamic"}, DynamicLayer),
        ({"cache_implementation": "static"}, StaticPackedLayer),
        ({"use_cache": False}, None),
    ],
)
def test_a_generation_config_may_say_which_cache(
    given: bool,
    settings: dict[str, Any],
    kind: type | None,
    rounding: Callable[[str, str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = rounding("llama", "W16A4KV")
    config = GenerationConfig(max_new_tokens=3, return_dict_in_generate=True, **settings)
    if not given:
        monkeypatch.setattr(model, "generation_config", config)
    found = model.generate(tokens_of(TEXT[:12]), **({"generation_config": config} if given else {}))
    cache = found.past_key_values
    assert cache is None if kind is None else type(cache.layers[0]) is kind


@torch.no_grad()
def test_cropping_reordering_and_repeating(rounding: Callable[[str, str], Any]) -> None:
    model = rounding("llama", "W16A4KV")
    tokens = tokens_of(TEXT, TEXT[::-1])
    cache = packed_cache(model)
    assert cache is not None
    model(input_ids=tokens, past_key_values=cache)
    cache.crop(-5)
    again = model(input_ids=tokens[:, -5:], past_key_values=copy.deepcopy(cache)).logits
    whole = model(input_ids=tokens).logits[:, -5:]
    assert torch.allclose(again, whole, atol=1e-4 * float(whole.abs().max()))
    kept = [layer.keys.clone() for layer in cache.layers]
    cache.reorder_cache(torch.tensor([1, 0]))
    assert all(torch.equal(a.flip(0), b.keys) for a, b in zip(kept, cache.layers, strict=True))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert all(torch.equal(a.flip(0), b.keys) for a, b in zip(kept, cache.layers, strict=True))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert all(isinstance(layer, PackedLayer) for layer in cache.layers)


def test_models_that_keep_floats_have_no_packed_cache(
    rounding: Callable[[str, str], Any],
) -> None:
    assert packed_cache(rounding("llama", "W4A16")) is None


@pytest.mark.parametrize("scheme", ["W16A4KV", UNEVEN])
@torch.no_grad()
def test_attention_of_transformers_meets_floats(
    scheme: str, rounding: Callable[[str, str], Any]
) -> None:
    model = rounding("llama", scheme)
    tokens = tokens_of(TEXT, TEXT[::-1])
    own = model.config._attn_implementation
    found = {}
    exchange = type(model).set_attn_implementation  # the model's own refuses
    for name in (own, "eager", "sdpa"):
        exchange(model, name)
        cache = packed_cache(model)
        model(input_ids=tokens[:, :-1], past_key_values=cache)
        found[name] = model(input_ids=tokens[:, -1:], past_key_values=cache).logits
    exchange(model, own)
    largest = float(found[own].abs().max())
    for name in ("eager", "sdpa"):
        assert torch.allclose(found[name], found[own], atol=1e-4 * largest)


class Doubling(StaticGrid):
    """A grid of somebody else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def wrapped(model: Any) -> None:
    class Around(torch.nn.Module):
        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.block(*args, **kwargs) + torch.linspace(-3, 3, 64)

    model.model.layers[1] = Around(model.model.layers[1])


def patched(model: Any) -> None:
    grid = model.model.layers[0].self_attn.sites.key
    old = grid.forward
    grid.forward = lambda x: old(x) * 2


def hooked(model: Any) -> None:
    grid = model.model.layers[0].self_attn.sites.value
    grid.register_forward_hook(lambda module, args, output: output * 2)


def replaced(model: Any) -> None:
    model.model.layers[1].self_attn.sites.key.__class__ = Doubling


def exchanged(model: Any) -> None:
    model.model.layers = torch.nn.ModuleList([model.model.layers[1], model.model.layers[0]])


def removed(model: Any) -> None:
    del model.model.layers[0].self_attn.sites


@pytest.mark.parametrize("change", [wrapped, patched, hooked, replaced, exchanged, removed])
def test_changed_models_round_in_attention(
    change: Callable[[Any], None], rounding: Callable[[str, str], Any]
) -> None:
    model = rounding("llama", "W16A4KV")
    tokens = tokens_of(TEXT[:12])
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    before = model.generate(tokens, **asked)
    change(model)
    floats = DynamicCache(config=model.config)
    expected = model.generate(tokens, past_key_values=floats, **asked)
    assert not torch.equal(expected, before)
    assert packed_cache(model) is None
    assert torch.equal(model.generate(tokens, **asked), expected)
