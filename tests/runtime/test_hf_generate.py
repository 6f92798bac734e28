"""``model.generate`` of quantized models: natively the same as by transformers alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantine import load
from quantine.runtime import hf_generate
from quantine.runtime.decoder import batch_for
from tiny_models import some_tokens

Packed = Callable[[str, str], Path]


class Calls:
    """Counts the decoders that are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = 0
        monkeypatch.setattr(hf_generate, "batch_for", self._make)

    def _make(self, *arguments: Any) -> Any:
        self.made += 1
        return batch_for(*arguments)


@pytest.fixture
def model(packed: Packed) -> Any:
    model = load(packed("llama", "rtn"), dtype=torch.float32)[0]
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def both(model: Any, tokens: Tensor, **options: Any) -> tuple[Any, Any]:
    """Of ``model.generate``, and of transformers alone."""
    results = []
    for generate in (model.generate, lambda *a, **k: type(model).generate(model, *a, **k)):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            results.append(generate(tokens, **options))
    return results[0], results[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": True, "top_k": 20, "top_p": 0.8},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 5},
        {"attention_mask": torch.ones(1, 9, dtype=torch.long)},
    ],
    ids=lambda options: ",".join(options) or "greedy",
)
def test_the_same_tokens(options: dict[str, Any], model: Any, calls: Calls) -> None:
    native, wanted = both(model, some_tokens(9, 1), max_new_tokens=12, **options)
    assert torch.equal(native, wanted)
    assert native.shape == (1, 21)
    assert calls.made == 1


def test_end_tokens_end(model: Any, calls: Calls) -> None:
    tokens = some_tokens(9, 1)
    end = int(model.generate(tokens, max_new_tokens=6)[0, 12])
    native, wanted = both(model, tokens, max_new_tokens=6, eos_token_id=end)
    assert torch.equal(native, wanted)
    assert native[0, -1] == end
    assert native.shape[1] <= 13
    assert calls.made == 1


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"attention_mask": torch.tensor([[1, 0] + [1] * 7])},
        {"use_cache": False},
    ],
    ids=lambda options: ",".join(options),
)
def test_other_calls_go_to_transformers(options: dict[str, Any], model: Any, calls: Calls) -> None:
    native, wanted = both(model, some_tokens(9, 1), max_new_tokens=5, **options)
    assert torch.equal(native, wanted)
    assert calls.made == 0


def test_structured_outputs_go_to_transformers(model: Any, calls: Calls) -> None:
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True}
    native, wanted = both(model, some_tokens(9, 1), max_new_tokens=5, **options)
    assert torch.equal(native.sequences, wanted.sequences)
    assert len(native.scores) == 5
    assert calls.made == 0


@pytest.mark.parametrize("sample", [False, True])
def test_batches_with_padding_get_the_same_tokens(sample: bool, model: Any, calls: Calls) -> None:
    tokens = some_tokens(9, 3)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    model.generation_config.pad_token_id = 0
    options = {"max_new_tokens": 8, "do_sample": sample, "attention_mask": mask}
    native, wanted = both(model, tokens, **options)
    assert torch.equal(native, wanted)
    model.generation_config.eos_token_id = int(wanted[2, 11])  # this text ends before the others
    native, wanted = both(model, tokens, **options)
    assert torch.equal(native, wanted)
    assert 0 in native[2, 9:]
    native, wanted = both(
        model, tokens[:1], max_new_tokens=5, num_return_sequences=2, do_sample=True
    )
    assert torch.equal(native, wanted)
    assert calls.made == 1


class Heard:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("count", [1, 2])
def test_streamers_hear_everything_once(count: int, model: Any, calls: Calls) -> None:
    heard = [Heard(), Heard()]
    batch = some_tokens(9, count)
    model.generate(batch, max_new_tokens=4, streamer=heard[0])
    type(model).generate(model, batch, max_new_tokens=4, streamer=heard[1])
    assert heard[0].parts == heard[1].parts
    assert heard[0].ended == heard[1].ended == 1
    assert calls.made == 1


def test_a_decoder_is_kept_until_the_model_changes(model: Any, calls: Calls) -> None:
    tokens = some_tokens(9, 1)
    for _ in range(2):
        model.generate(tokens, max_new_tokens=5)
    assert calls.made == 1
    model.generate(tokens, max_new_tokens=50)  # needs room
    assert calls.made == 2
    with torch.no_grad():
        model.model.norm.weight.mul_(-1.0)
    native, wanted = both(model, tokens, max_new_tokens=5)
    assert torch.equal(native, wanted)
    model.model.norm.weight = torch.nn.Parameter(torch.randn(model.config.hidden_size))
    native, wanted = both(model, tokens, max_new_tokens=5)
    assert torch.equal(native, wanted)


def test_a_changed_configuration_is_noticed(
    model: Any, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = some_tokens(9, 1)
    model.generate(tokens, max_new_tokens=3, do_sample=False)
    model.config.final_logit_softcapping = 5.0  # Llama has no such bound
    model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert calls.made == 2  # the second was refused
    assert "logits are capped" in caplog.text


def test_copies_are_on_their_own(model: Any, calls: Calls) -> None:
    tokens = some_tokens(9, 1)
    before = model.generate(tokens, max_new_tokens=5)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(-1.0)
    native, wanted = both(other, tokens, max_new_tokens=5)
    assert torch.equal(native, wanted)
    assert torch.equal(model.generate(tokens, max_new_tokens=5), before)
    assert calls.made == 2


def test_a_refusal_is_told_once(
    packed: Packed, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(packed("llama", "rtn"), dtype=torch.float32)[0].train()
    with caplog.at_level(logging.WARNING, "quantine"):
        for _ in range(2):
            native, wanted = both(model, some_tokens(9, 1), max_new_tokens=5)
            assert torch.equal(native, wanted)
    assert [record.getMessage() for record in caplog.records if record.name == "quantine"] == [
        "generating with the modules of transformers: no native decoder: the model is in training "
        "mode"
    ]
    assert calls.made == 0
