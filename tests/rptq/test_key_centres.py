"""The centre of keys is their mean before rotary embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantine.errors import FamilyError
from quantine.families.rotary import turns_of
from quantine.rptq.key_centres import centre_of_keys


class Rotary(nn.Module):
    def __init__(self, turns: Tensor, kind: str = "default") -> None:
        super().__init__()
        self.register_buffer("inv_freq", turns)
        self.register_buffer("original_inv_freq", turns * 2)
        self.rope_type = kind


def turned(mean: Tensor, turns: Tensor, tokens: int, beside: bool) -> Tensor:
    """``mean`` ``[heads, dim]`` after rotary embeddings, ``[tokens, heads, dim]``."""
    pairs = len(turns)
    first = torch.arange(pairs) * 2 if beside else torch.arange(pairs)
    second = first + 1 if beside else first + pairs
    angles = torch.arange(tokens)[:, None, None] * turns
    keys = mean.repeat(tokens, 1, 1)
    one, other = mean[:, first], mean[:, second]
    keys[..., first] = one * angles.cos() - other * angles.sin()
    keys[..., second] = other * angles.cos() + one * angles.sin()
    return keys


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("pairs", [8, 3])
def test_a_mean_is_found_again_at_all_positions(beside: bool, pairs: int) -> None:
    turns, mean = torch.logspace(0, -3, pairs), torch.randn(2, 16) * 10
    tokens = 64
    keys = turned(mean, turns, 4 * tokens, beside)
    noise = torch.randn(tokens, 2, 16) * 0.1
    seen = keys[:tokens] + noise
    seen[0] = 99.0  # the first token has a key of its own
    model: Any = Rotary(turns)
    centre = centre_of_keys(seen.flatten(1), 2, model)
    found = centre.by_head(16).at(torch.arange(4 * tokens))
    assert torch.equal(found[0], seen[0])
    # Calibration saw a quarter of these positions.
    assert float((found - keys)[1:].abs().max()) < 0.1


def test_keys_that_do_not_turn_have_a_mean() -> None:
    mean = torch.randn(2, 16) * 10
    keys = mean.repeat(64, 1, 1) + torch.randn(64, 2, 16) * 0.1
    model: Any = Rotary(torch.logspace(0, -3, 8))
    found = centre_of_keys(keys.flatten(1), 2, model).by_head(16).at(torch.arange(1, 4096))
    assert float((found - mean).abs().max()) < 0.1


def test_models_without_fixed_angles_are_refused() -> None:
    turns = torch.logspace(0, -3, 4)
    several: Any = nn.Sequential(Rotary(turns), Rotary(turns / 2))
    alike: Any = nn.Sequential(Rotary(turns), Rotary(turns.clone()))
    none: Any = nn.Linear(2, 2)
    longer: Any = Rotary(turns, "dynamic")
    assert torch.equal(turns_of(alike), turns)
    for model, why in (
        (several, "has 2 kinds of rotary"),
        (none, "has no kinds of rotary"),
        (longer, "of type dynamic: leave out -centred"),
    ):
        with pytest.raises(FamilyError, match=why):
            turns_of(model)
    wide: Any = Rotary(torch.ones(16))
    with pytest.raises(FamilyError, match="32 channels of heads of 16 would be turned"):
        centre_of_keys(torch.zeros(3, 32), 2, wide)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_models_say_their_angles(name: str, tiny: Any) -> None:
    from transformers import AutoModelForCausalLM

    path: Path = tiny(name)
    model = AutoModelForCausalLM.from_pretrained(path)
    turns = turns_of(model)
    assert float(turns[0]) == 1
    width = model.config.hidden_size // model.config.num_attention_heads
    assert 2 * len(turns) == (getattr(model.config, "head_dim", None) or width)
