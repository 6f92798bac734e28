"""Text token by token."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from quantine import CalibrationError, PlanError
from quantine.runtime import generate
from quantine.runtime.generate import SEPARATOR, continue_tokens, stream
from quantine.runtime.prompt import conversation_ids, text_ids
from quantine.runtime.sampling import Sampler, Sampling
from tiny_models import BOS, EOS, byte_tokenizer, logits_of, some_tokens, with_weights

Tiny = Callable[[str], Path]


def continued(model: Any, count: int, **options: Any) -> list[int]:
    return list(continue_tokens(model, some_tokens(9, 1), count, Sampling(**options)))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bloom"])
def test_greedy_tokens_need_no_cache_to_be_right(name: str, tiny: Tiny) -> None:
    model = with_weights(tiny(name), {})
    model.generation_config.eos_token_id = None
    tokens = some_tokens(9, 1)
    for made in continued(model, 5):
        assert made == int(logits_of(model, tokens)[0, -1].argmax())
        tokens = torch.cat([tokens, torch.tensor([[made]])], 1)
    assert tokens.shape[1] == 9 + 5


@pytest.mark.parametrize("listed", [False, True])
def test_an_end_token_ends_it_and_is_not_shown(listed: bool, tiny: Tiny) -> None:
    model = with_weights(tiny("llama"), {})
    model.generation_config.eos_token_id = None
    made = continued(model, 6)
    end = made[3]
    model.generation_config.eos_token_id = [EOS, end] if listed else end
    assert continued(model, 6) == made[: made.index(end)]


def test_sampling_follows_the_softmax(tiny: Tiny) -> None:
    model = with_weights(tiny("llama"), {})
    model.generation_config.eos_token_id = None
    probabilities = (logits_of(model, some_tokens(9, 1))[0, -1] / 0.5).softmax(-1)
    draws = torch.tensor(
        [continued(model, 1, temperature=0.5, seed=seed)[0] for seed in range(400)]
    )
    shares = torch.bincount(draws, minlength=300) / 400
    spread = (probabilities * (1 - probabilities) / 400).sqrt()
    assert ((shares - probabilities).abs() <= 5 * spread + 1 / 400).all()


def test_top_p_leaves_the_fewest_most_likely_tokens_that_reach_it() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    for top_p, kept in (
        (0.3, {1}),
        (0.41, {1, 3}),
        (0.7, {1, 3}),
        (0.89, {1, 2, 3}),
        (1.0, {*range(4)}),
    ):
        sampler = Sampler(Sampling(1.0, top_p))
        assert {sampler.choose(logits) for _ in range(200)} == kept


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"temperature": 1e-9}, {"top_p": 0.0}, {"seed": -1}]
)
def test_sampling_out_of_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=f"{next(iter(options))} must"):
        Sampling(**options)


def test_a_character_of_several_tokens_is_written_whole(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = byte_tokenizer(bos=False)("a\u00e9\U0001f600b")["input_ids"]
    assert len(tokens) == 1 + 2 + 4 + 1

    def fixed(*_: Any) -> Iterator[int]:
        return iter(tokens)

    monkeypatch.setattr(generate, "continue_tokens", fixed)
    written: list[str] = []

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    log = io.StringIO()
    stream(
        tiny("llama"),
        ["x"],
        tokens=8,
        chat=False,
        temperature=0.0,
        seed=0,
        dtype=torch.float32,
        out=Screen(),
        log=log,
    )
    assert [text for text in written if text] == ["a", "\u00e9", "\U0001f600", "b", "\n"]
    assert log.getvalue().startswith("2 prompt tokens")


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_several_prompts_get_the_texts_that_they_get_alone(
    temperature: float, packed: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "TOGETHER", 3)  # two wait until texts end
    directory = packed("llama", "rtn")

    def written(*prompts: str) -> tuple[str, str]:
        out, log = io.StringIO(), io.StringIO()
        stream(
            directory,
            prompts,
            tokens=7,
            chat=False,
            temperature=temperature,
            seed=5,
            dtype=torch.float32,
            out=out,
            log=log,
        )
        return out.getvalue(), log.getvalue()

    prompts = ("One", "and two", "three or so", "four", "a fifth one")
    together, log = written(*prompts)
    assert together.split(f"{SEPARATOR}\n") == [written(prompt)[0] for prompt in prompts]
    assert log.startswith(f"{sum(map(len, prompts)) + 5} prompt tokens")


def test_the_chat_template_wraps_the_prompt_once() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "Hi"}]
    ids = conversation_ids(tokenizer, messages, 300)[0].tolist()
    assert ids.count(BOS) == 1
    assert tokenizer.decode(ids) == "<s>[user] Hi"
    assert text_ids(tokenizer, "Hi", 300)[0].tolist()[0] == BOS


def test_a_template_that_refuses_is_quoted() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match="refuses the messages: roles must alternate"):
        conversation_ids(tokenizer, [{"role": "user", "content": "Hi"}], 300)


def test_a_prompt_is_not_ended() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    ids = text_ids(tokenizer, "Hi", 300)[0].tolist()
    assert ids == byte_tokenizer()("Hi")["input_ids"]


def test_a_prompt_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(CalibrationError, match="do not belong together"):
        text_ids(byte_tokenizer(), "Hi", 60)
