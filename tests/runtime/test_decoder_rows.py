"""Several tokens at once in the native decoder: the same bits as one by one, and as alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from quantine import load
from quantine.core.arithmetic import ARITHMETICS, Arithmetic
from quantine.kernels import backend
from quantine.runtime.decoder import Decoder, batch_for, decoder_for
from tiny_models import VOCAB, random_model, some_tokens, tiny_config

Packed = Callable[[str, str], Path]

MODELS: Final = (
    ("llama", "mixed"),
    ("opt", "mixed"),
    ("gemma3", "rtn"),
    ("llama", "W4A8"),
    ("mistral", "W4A4KV"),
    ("opt", "W4A4"),
)
"""Outliers and stored orders, windows, packed keys and values, and products in integers, which
prompts of many tokens have."""
ROWS: Final = 21
"""Tokens at once: two whole blocks of rows of every level, and rests of all sizes."""


NATIVE: Any = backend.native()


@pytest.fixture(params=NATIVE.levels() if NATIVE else ())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = NATIVE.level()
    NATIVE.use_level(request.param)
    yield request.param
    NATIVE.use_level(before)


def one_by_one(decoder: Decoder, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Logits after each of ``tokens``, ``[n, vocabulary]``."""
    decoder.reset()
    decoder.append(prompt)
    return torch.stack([decoder.append(token).clone() for token in tokens.split(1)])


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize(("name", "kind"), MODELS)
def test_rows_of_one_text_have_the_bits_of_single_tokens(
    name: str, kind: str, arithmetic: Arithmetic, packed: Packed
) -> None:
    model = load(packed(name, kind), torch.float32, arithmetic)[0]
    decoder = decoder_for(model, 64)
    tokens = some_tokens(20 + ROWS, 1)[0]
    prompt, rest = tokens[:20], tokens[20:]
    wanted = one_by_one(decoder, prompt, rest)
    decoder.reset()
    decoder.append(prompt)
    decoder.step((rest + 1) % VOCAB)  # wrong guesses, which are taken back
    decoder.truncate(20)
    found = torch.cat([decoder.step(part) for part in rest.split([1, 2, ROWS - 3])])
    assert torch.equal(found, wanted)
    assert decoder.position == 20 + ROWS


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize(("name", "kind"), MODELS[::2])
def test_texts_of_a_batch_have_the_bits_that_they_have_alone(
    name: str, kind: str, arithmetic: Arithmetic, packed: Packed
) -> None:
    model = load(packed(name, kind), torch.float32, arithmetic)[0]
    count, steps = 13, 4
    alone, batch = decoder_for(model, 40), batch_for(model, 40, count)
    texts = [tokens[: 3 + 2 * place] for place, tokens in enumerate(some_tokens(40, count))]
    wanted = [one_by_one(alone, text[:-steps], text[-steps:]) for text in texts[1:]]
    for place, text in enumerate(texts[1:]):
        batch.texts[place + 1].append(text[:-steps])
    going = list(range(1, count))
    for at in range(steps):
        found = batch.step(going, torch.stack([texts[place][at - steps] for place in going]))
        for row, place in zip(found, going, strict=True):
            assert torch.equal(row, wanted[place - 1][at])
        going = [going[-1], *going[1:-1]]  # the first one drops out, and others change places


def test_many_rows_take_several_passes() -> None:
    model = random_model(tiny_config("llama"))
    tokens = some_tokens(100, 1)[0]
    decoder = decoder_for(model, 100)
    wanted = one_by_one(decoder, tokens[:5], tokens[5:])
    decoder.truncate(5)
    assert torch.equal(decoder.step(tokens[5:]), wanted)


def test_a_pass_that_does_not_fit_changes_nothing() -> None:
    batch = batch_for(random_model(tiny_config("llama")), 8, 2)
    tokens = some_tokens(8, 1)[0]
    for text in batch.texts:
        text.append(tokens[:7])
    with pytest.raises(ValueError, match="no room for 2 more tokens: 7 of 8"):
        batch.step([0, 1, 1], tokens[:3])
    with pytest.raises(ValueError, match="there is no text 2"):
        batch.step([0, 2], tokens[:2])
    with pytest.raises(ValueError, match="not below"):
        batch.step([0, 1], torch.tensor([3, VOCAB]))
    assert [text.position for text in batch.texts] == [7, 7]
    batch.texts[0].truncate(9)
    assert batch.texts[0].position == 7


def test_threads_with_texts_of_one_batch_wait_for_each_other() -> None:
    model = random_model(tiny_config("llama"))
    tokens = [some_tokens(30)[0], some_tokens(30)[0].flip(0)]
    alone = decoder_for(model, 30)
    batch = batch_for(model, 30, 2)

    def written(decoder: Decoder, text: Tensor) -> Tensor:
        decoder.reset()
        return torch.stack([decoder.append(token).clone() for token in text.split(1)])

    wanted = [written(alone, text) for text in tokens]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(20):
            found = threads.map(written, batch.texts, tokens)
            for one, expected in zip(found, wanted, strict=True):
                assert torch.equal(one, expected)
