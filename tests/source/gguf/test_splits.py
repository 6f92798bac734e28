"""Tokenizers of GGUF files split text as llama.cpp does, going by the file's name for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ggufs import write_gguf
from quantine.errors import CheckpointError
from quantine.source.gguf.splits import SPLITS
from quantine.source.locate import locate
from tiny_models import random_model, tiny_config

TEXT = "We'LL see 12345 (été), the\n\n\n 67 x_1."
PIECES = {
    "gpt-2": ["We", "'", "LL", " see", " 12345", " (", "été", "),", " the", "\n\n\n", " 67"],
    "smollm": ["We", "'", "LL", " see", " ", "1", "2", "3", "4", "5", " (", "été", "),", " the"],
    "llama-bpe": ["We", "'LL", " see", " ", "123", "45", " (", "été", "),", " the", "\n\n\n", " "],
    "qwen2": ["We", "'LL", " see", " ", "1", "2", "3", "4", "5", " (", "été", "),", " the"],
    "bloom": ["We'LL", " see", " 12345", " (", "été", "),", " the", "\n\n\n", " 67", " x_1"],
    "falcon": ["We", "'", "LL", " see", " ", "123", "45", " ", "(", "été", "),", " the", "\n\n\n"],
    "default": ["We", "'", "LL", " see", " ", "123", "45", " ", "(", "été", "),", " the", "\n\n\n"],
}
"""What the text is split into first, worked out from llama.cpp's patterns."""


def tokenizer_with(pre: str, tmp_path: Path, family: str = "llama", **further: Any) -> Any:
    path = write_gguf(tmp_path / "m.gguf", random_model(tiny_config(family)), pre=pre, **further)
    return locate(path).tokenizer()


def pieces_of(tokenizer: Any) -> list[str]:
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    return [TEXT[start:end] for _, (start, end) in cut]


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.name)
def test_text_is_split_as_every_name_says(split: Any, tmp_path: Path) -> None:
    wanted = PIECES[split.name]
    for name in (split.name, *split.aliases):
        tokenizer = tokenizer_with(name, tmp_path)
        assert pieces_of(tokenizer)[: len(wanted)] == wanted, name
        assert tokenizer.backend_tokenizer.model.ignore_merges == split.whole_words


@pytest.mark.parametrize(
    ("family", "pre"), [("llama", "smollm"), ("qwen2", "qwen2"), ("gpt2", "gpt-2")]
)
def test_a_saved_tokenizer_splits_text_in_the_same_way(
    family: str, pre: str, tmp_path: Path
) -> None:
    tokenizer = tokenizer_with(pre, tmp_path, family)
    tokenizer.save_pretrained(tmp_path / "saved")
    tiny_config(family).save_pretrained(tmp_path / "saved")
    assert pieces_of(AutoTokenizer.from_pretrained(tmp_path / "saved")) == pieces_of(tokenizer)


@pytest.mark.parametrize(
    ("family", "pre", "kind"), [("qwen2", "smollm", "Qwen2"), ("gpt2", "llama-bpe", "GPT2")]
)
def test_ways_that_would_be_lost_when_it_is_loaded_again(
    family: str, pre: str, kind: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"{pre} does .*, but transformers' {kind}Tokenizer"):
        tokenizer_with(pre, tmp_path, family)


def test_special_tokens_that_transformers_spells_otherwise(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"its bos_token is number 270, but .*\[pad 11\]"):
        tokenizer_with("llama-bpe", tmp_path, bos=270)


def test_ways_that_transformers_knows_are_left_to_it(tmp_path: Path) -> None:
    assert pieces_of(tokenizer_with("gpt-4o", tmp_path))[:3] == ["We'LL", " see", " "]
    assert tokenizer_with("tekken", tmp_path).backend_tokenizer.model.ignore_merges


def test_an_unknown_way_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"deepseek-coder.*tokenizer\.ggml\.pre.*directory"):
        tokenizer_with("deepseek-coder", tmp_path)


@pytest.mark.parametrize(
    ("pre", "said", "there"),
    [
        ("llama-bpe", None, True),
        ("tekken", None, True),
        ("qwen2", None, False),
        ("llama-bpe", False, False),
        ("qwen2", True, True),
    ],
)
def test_the_first_token_is_there_where_llama_cpp_puts_it(
    pre: str, said: bool | None, there: bool, tmp_path: Path
) -> None:
    changes = {} if said is None else {".tokenizer.ggml.add_bos_token": said}
    tokenizer = tokenizer_with(pre, tmp_path, changes=changes)
    tokenizer.save_pretrained(tmp_path / "saved")
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        ids = one("he")["input_ids"]
        assert (ids[0] == one.bos_token_id) == there
        assert ids[there:] == one("he", add_special_tokens=False)["input_ids"]


def test_the_last_token_is_there_where_the_file_says(tmp_path: Path) -> None:
    tokenizer = tokenizer_with("qwen2", tmp_path, changes={".tokenizer.ggml.add_eos_token": True})
    plain = tokenizer("he", add_special_tokens=False)["input_ids"]
    assert tokenizer("he")["input_ids"] == [*plain, tokenizer.eos_token_id]
