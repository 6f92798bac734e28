"""Guesses from the text so far: the same tokens as without, in fewer passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from quantine import load
from quantine.core.arithmetic import ARITHMETICS, Arithmetic
from quantine.runtime import prompt_lookup
from quantine.runtime.decoder import Decoder, decoder_for, most_likely
from quantine.runtime.generate import continue_tokens
from quantine.runtime.prompt_lookup import FIRST, LONGEST_PAUSE, MOST, PromptLookup
from quantine.runtime.sampling import Sampling
from tiny_models import some_tokens

Packed = Callable[[str, str], Path]

MODELS: Final = (
    ("llama", "mixed"),
    ("gemma3", "rtn"),
    ("llama", "W4A8"),
    ("mistral", "W4A4KV"),
    ("opt", "W4A8"),
)
NEW: Final = 40


class Counted(Decoder):
    """A decoder that keeps how many tokens were in each pass of several."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder._native)
        self.passes: list[int] = []

    def step(self, tokens: Tensor) -> Tensor:
        self.passes.append(len(tokens))
        return super().step(tokens)


def plainly(decoder: Decoder, prompt: Tensor, count: int) -> list[int]:
    """The most likely tokens, without guesses."""
    made = [most_likely(decoder.append(prompt))]
    while len(made) < count:
        made.append(most_likely(decoder.append(torch.tensor(made[-1:]))))
    return made


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize(("name", "kind"), MODELS)
def test_tokens_are_the_same_with_guesses_and_without(
    name: str, kind: str, arithmetic: Arithmetic, packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tiny models with random weights seldom repeat themselves: many guesses, right and wrong.
    monkeypatch.setattr(prompt_lookup, "ENDING", 1)
    monkeypatch.setattr(prompt_lookup, "LONGEST_PAUSE", 0)
    model = load(packed(name, kind), torch.float32, arithmetic)[0]
    model.generation_config.eos_token_id = None
    decoder = Counted(decoder_for(model, 60 + NEW))
    for repeats in (1, 3):
        prompt = some_tokens(60 // repeats, 1).repeat(1, repeats)
        decoder.reset()
        wanted = plainly(decoder, prompt[0], NEW)
        decoder.reset()
        assert list(continue_tokens(model, prompt, NEW, Sampling(), decoder)) == wanted
        assert decoder.position == prompt.shape[1] + NEW - 1
    assert len(decoder.passes) > 5


class Scripted(Decoder):
    """A decoder that knows the text by heart."""

    def __init__(self, text: list[int]) -> None:
        self._text_ids, self._seen = text, 0
        self.passes = 0

    @property
    def position(self) -> int:
        return self._seen

    def append(self, tokens: Tensor) -> Tensor:
        return self.step(tokens)[-1]

    def step(self, tokens: Tensor) -> Tensor:
        self.passes += 1
        self._seen += len(tokens)
        following = self._text_ids[self._seen - len(tokens) + 1 : self._seen + 1]
        return torch.nn.functional.one_hot(torch.tensor(following), 100).float()

    def truncate(self, position: int) -> None:
        self._seen = position


def test_a_text_that_repeats_itself_takes_few_passes() -> None:
    sentence = torch.randperm(90, generator=torch.Generator().manual_seed(0)).tolist()
    text = [*sentence, 95, *sentence[:60], 96, *sentence[30:]]
    decoder = Scripted([*text, 0])
    made = list(prompt_lookup.most_likely_tokens(decoder, torch.tensor(text[:91]), 121))
    assert made == text[91:]
    assert decoder.passes < 121 / 4


def test_samples_are_drawn_without_guesses(packed: Packed) -> None:
    model: Any = load(packed("llama", "rtn"), torch.float32)[0]
    model.generation_config.eos_token_id = None
    decoder = Counted(decoder_for(model, 40))
    prompt = some_tokens(5, 1).repeat(1, 4)
    assert len(list(continue_tokens(model, prompt, 20, Sampling(0.5), decoder))) == 20
    assert not decoder.passes


def test_an_ending_is_followed_by_what_followed_it_last() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 9, 1, 2, 3, 5, 6, 1, 2, 3])
    assert lookup.draft(10) == [5, 6][:FIRST]
    assert lookup.draft(1) == [5]
    assert lookup.draft(0) == []
    lookup.add([8])
    assert lookup.draft(10) == []  # 2, 3, 8 is new
    assert PromptLookup([]).draft(3) == []


def test_right_guesses_become_longer_and_wrong_ones_pause() -> None:
    lookup = PromptLookup([1, 2, 3] * 20)
    for _ in range(5):
        drafted = len(lookup.draft(100))
        lookup.judge(drafted, drafted)
    assert lookup.draft(100) == [1, 2, 3] * (MOST // 3)
    pauses = []
    for _ in range(8):
        lookup.judge(2, 0)
        pauses.append(0)
        while not lookup.draft(100):
            lookup.add([[1, 2, 3][pauses[-1] % 3]])
            pauses[-1] += 1
    assert pauses == sorted(pauses)
    assert pauses[0] < 10 <= LONGEST_PAUSE <= pauses[-1] < LONGEST_PAUSE + 3
