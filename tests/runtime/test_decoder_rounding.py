"""The native decoder of models that round activations, against their modules.

Numbers of both differ by float noise, and a value that lies next to the middle between two codes
then gets another code now and then, which changes all that follows. So a step counts as equal if
its logits agree to float noise, and most steps must be; an error in what is computed leaves none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from quantine import load
from quantine.activations.grids import StaticGrid, TokenGrid
from quantine.core.arithmetic import Arithmetic
from quantine.errors import BackendUnavailable
from quantine.kernels import backend
from quantine.kernels.threads import pool
from quantine.runtime.decoder import decoder_for
from quantine.runtime.decoder_rounding import Roundings
from quantine.runtime.generate import ModuleDecoder
from tiny_models import some_tokens

Packed = Callable[[str, str], Path]

SCHEMES: Final = (
    ("llama", "W4A8"),
    ("llama", "W4A4KV"),
    ("llama", "W3A3KV"),
    ("llama", "W4A4"),
    ("llama", "W4A4-strict"),
    ("llama", "W16A4"),
    ("mistral", "W4A4KV"),
    ("opt", "W4A8"),
    ("opt", "W4A4"),
)
"""Models, the windows of Mistral's among them, and schemes."""
FURTHER: Final = (("phi3", "W4A8"), ("gemma2", "W4A4KV"))
"""Models with fused matrices, or scores that have a bound."""
NOISE: Final[dict[Arithmetic, float]] = {"exact": 2e-5, "fast": 2e-3}
"""Of logits of equal steps, relative to the largest of a row. In fast arithmetic the products of
modules and decoder meet rounded activations alike, but noise is larger."""
ROOM: Final = 80
"""Number of tokens of the longest text."""
SHARE: Final = 1 / 3
"""Of steps that must be equal."""


def rounded_model(packed: Packed, name: str, scheme: str, arithmetic: Arithmetic = "exact") -> Any:
    return load(packed(name, scheme), torch.float32, arithmetic)[0]


def differences(model: Any, prompt: int, texts: int, tokens_each: int) -> Tensor:
    """Differences from the modules, relative to the largest logit, of a prompt and single steps.

    Several texts are decoded, as one other code early in a text changes all of it.

    Returns:
        ``[texts * steps]``.
    """
    decoder = decoder_for(model, ROOM)
    found = []
    for tokens in some_tokens(tokens_each, texts):
        decoder.reset()
        modules = ModuleDecoder(model)
        for part in (tokens[:prompt], *tokens[prompt:].split(1)):
            wanted = modules.append(part)
            difference = (decoder.append(part) - wanted).abs().max() / wanted.abs().max()
            found.append(float(difference))
    return torch.tensor(found)


def assert_mostly_equal(found: Tensor, noise: float) -> None:
    share = float((found <= noise).float().mean())
    assert share > SHARE, found


@pytest.mark.parametrize(("name", "scheme"), SCHEMES)
def test_steps_are_those_of_the_modules(name: str, scheme: str, packed: Packed) -> None:
    model = rounded_model(packed, name, scheme)
    assert_mostly_equal(differences(model, 5, 2, ROOM), NOISE["exact"])


@pytest.mark.parametrize(("name", "scheme"), [*SCHEMES, *FURTHER])
def test_prompts_are_those_of_the_modules(name: str, scheme: str, packed: Packed) -> None:
    model = rounded_model(packed, name, scheme)
    # 64 tokens are multiplied in integers, the rest as floats.
    assert_mostly_equal(differences(model, 66, 6, 70), NOISE["exact"])


def test_every_instruction_set_decodes_alike(packed: Packed) -> None:
    native = backend.native()
    assert native is not None
    model, before = rounded_model(packed, "llama", "W4A4KV"), native.level()
    try:
        for level in native.levels():
            native.use_level(level)
            assert_mostly_equal(differences(model, 7, 2, 40), NOISE["exact"])
    finally:
        native.use_level(before)


@pytest.mark.parametrize("scheme", ["W4A4KV", "W4A4-strict"])
def test_fast_arithmetic_stays_close(scheme: str, packed: Packed) -> None:
    model = rounded_model(packed, "llama", scheme, "fast")
    assert_mostly_equal(differences(model, 7, 2, 40), NOISE["fast"])


@pytest.mark.parametrize("scheme", ["W4A8", "W4A4"])
def test_threads_change_no_bit(scheme: str, packed: Packed) -> None:
    model = rounded_model(packed, "llama", scheme)
    tokens = some_tokens(ROOM, 1)[0]
    found = []
    for threads in (1, 3):
        decoder = decoder_for(model, ROOM, threads=threads)
        found.append(
            torch.stack([decoder.append(part).clone() for part in tokens.split([70, *[1] * 10])])
        )
    assert torch.equal(*found)


def test_generate_is_native_and_writes_the_same(packed: Packed) -> None:
    model = rounded_model(packed, "llama", "W4A4KV")
    model.generation_config.eos_token_id = None
    tokens = some_tokens(9, 1)
    asked = {"max_new_tokens": 20, "do_sample": False}
    found = model.generate(tokens, **asked)
    assert model.generate._kept is not None
    assert torch.equal(found, type(model).generate(model, tokens, **asked))


@given(
    bits=st.integers(2, 8),
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=90),
    factors=st.booleans(),
    seed=st.integers(0, 99),
)
def test_inputs_get_the_floats_of_their_grids(
    bits: int, labels: list[int], factors: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(4, generator=generator) * 10.0 ** -(seed % 4) + 1e-4
    zero = torch.randint(2**bits, (4,), generator=generator).float()
    reach = torch.rand(1, generator=generator) + 0.5 if factors else None
    grid = StaticGrid(bits, scale, zero, torch.tensor(labels, dtype=torch.int32), reach=reach)
    x = torch.randn(5, len(labels), generator=generator) * 10.0 ** (seed % 5 - 2)
    x[1] = 0.0
    x[2] *= 1e20
    x[3, 0] = torch.inf
    for module in (grid, TokenGrid(bits)):
        rows = x if module is grid else x[:3]  # without a finite range, a token has no grid
        assert torch.equal(natively(module, rows), module(rows))
    x[4, 0] = torch.nan
    assert natively(grid, x)[4].isnan().all()
    assert natively(TokenGrid(bits), x)[3:].isnan().all()


def natively(module: nn.Module, x: Tensor) -> Tensor:
    rounding = Roundings(backend.extension()).inputs(module, x.shape[1])
    found = torch.empty_like(x)
    rounding.round(x, found, pool())
    return found


def test_matrices_on_one_grid_share_their_inputs() -> None:
    roundings = Roundings(backend.extension())
    first, same, other = (
        StaticGrid(8, torch.tensor([scale]), torch.tensor([3.0]), torch.zeros(4, dtype=torch.int32))
        for scale in (0.5, 0.5, 0.25)
    )
    made = [roundings.inputs(grid, 4) for grid in (first, same, other)]
    assert made[0] is made[1]
    assert made[0] is not made[2]


class Doubling(StaticGrid):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0


def rounds_by_token(model: Any) -> None:
    model.model.layers[1].self_attn.sites.key = TokenGrid(4).eval()


def keeps_values(model: Any) -> None:
    model.model.layers[1].self_attn.sites.value = nn.Identity().eval()


def doubles_queries(model: Any) -> None:
    model.model.layers[1].self_attn.sites.query.__class__ = Doubling


def doubles_inputs(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.inputs.__class__ = Doubling


def attends_otherwise(model: Any) -> None:
    model.config._attn_implementation = "sdpa"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (rounds_by_token, "its keys have no static grids"),
        (keeps_values, "its values have no static grids"),
        (doubles_queries, "Doubling"),
        (doubles_inputs, "Doubling"),
        (attends_otherwise, "attention .* differs in sites"),
    ],
)
def test_refusals(change: Callable[[Any], None], reason: str, packed: Packed) -> None:
    model = rounded_model(packed, "llama", "W4A8")
    change(model)
    with pytest.raises(BackendUnavailable, match=f"no native decoder: .*{reason}"):
        decoder_for(model, 8)


def test_another_attention_function_of_this_name_is_refused(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = rounded_model(packed, "llama", "W4A8")
    other = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "quantine", other)
    with pytest.raises(BackendUnavailable, match="'quantine' was replaced"):
        decoder_for(model, 8)
