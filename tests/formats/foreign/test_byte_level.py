"""Byte-level tokenizers in GGUF files: what llama.cpp would do otherwise is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from quantine.errors import FormatError
from quantine.formats.foreign.gguf.tokenizer import tokenizer_of
from quantine.source.gguf.splits import LLAMA3

BOS, EOS, ROWS = 256, 257, 300
IDS = {"bos_token_id": BOS, "eos_token_id": EOS}


def byte_level(pattern: str | None = None, **model: Any) -> Tokenizer:
    """A tokenizer of 256 bytes, two special tokens and the word "hello", which no merge makes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: number for number, letter in enumerate(letters)}
    words["hello"] = 258
    made = Tokenizer(models.BPE(vocab=words, merges=[], **model))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    made.pre_tokenizer = bytes_only
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    made.decoder = decoders.ByteLevel()
    return made


def around(tokenizer: Tokenizer, before: bool, after: bool) -> Tokenizer:
    single = [*(["<s>"] if before else []), "$A", *(["</s>"] if after else [])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


def written(tokenizer: Tokenizer, tmp_path: Path, ids: dict[str, Any]) -> dict[str, Any]:
    found = json.loads(tokenizer.to_str())
    found["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    return tokenizer_of(tmp_path, ROWS, ids)[0]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_tokens_around_a_text_are_said(before: bool, after: bool, tmp_path: Path) -> None:
    values = written(around(byte_level(), before, after), tmp_path, IDS)
    assert values["tokenizer.ggml.add_bos_token"] is before
    assert values.get("tokenizer.ggml.add_eos_token", False) is after


@pytest.mark.parametrize("ids", [{**IDS, "bos_token_id": 3}, {"eos_token_id": EOS}])
def test_a_first_token_that_the_model_does_not_name_is_refused(
    ids: dict[str, int | None], tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=r"puts \[256\] around texts, but bos_token_id"):
        written(around(byte_level(), before=True, after=False), tmp_path, ids)


@pytest.mark.parametrize(("pattern", "wanted"), [(None, False), (LLAMA3, True)])
def test_words_that_no_merge_makes(pattern: str | None, wanted: bool, tmp_path: Path) -> None:
    written(byte_level(pattern, ignore_merges=wanted), tmp_path, IDS)
    with pytest.raises(FormatError, match=f"ignore_merges = {not wanted}, but llama.cpp takes"):
        written(byte_level(pattern, ignore_merges=not wanted), tmp_path, IDS)


def test_marks_of_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="end_of_word_suffix = '</w>'"):
        written(byte_level(end_of_word_suffix="</w>"), tmp_path, IDS)


@pytest.mark.parametrize("said", [None, -1, []])
@pytest.mark.parametrize("own", ["hello", {"content": "hello"}])
def test_the_last_token_is_the_tokenizers_own_where_the_model_names_none(
    said: Any, own: Any, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": own}))
    values = written(byte_level(), tmp_path, {"eos_token_id": said})
    assert values["tokenizer.ggml.eos_token_id"] == 258
    assert written(byte_level(), tmp_path, IDS)["tokenizer.ggml.eos_token_id"] == EOS


def test_a_last_token_that_nobody_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"which token ends a text.*give config\.json"):
        written(byte_level(), tmp_path, {"eos_token_id": -1})


def test_all_tokens_that_end_an_answer_are_written(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6, 5]}')
    values = written(byte_level(), tmp_path, {"eos_token_id": [EOS, 5]})
    assert values["tokenizer.ggml.eos_token_id"] == EOS
    assert values["tokenizer.ggml.eot_token_id"] == 5
    assert values["tokenizer.ggml.eom_token_id"] == 6
    _, notes = tokenizer_of(tmp_path, ROWS, {"eos_token_id": [EOS, 7, 8]})
    assert "llama.cpp is not told that tokens [5, 6] end an answer, too" in notes
    for damaged in ("{", "[]"):
        (tmp_path / "generation_config.json").write_text(damaged)
        with pytest.raises(FormatError, match=r"generation_config\.json"):
            tokenizer_of(tmp_path, ROWS, IDS)


def test_the_usual_one_of_several_chat_templates_is_written(tmp_path: Path) -> None:
    named = [{"name": name, "template": f"for {name}"} for name in ("tool_use", "default")]
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": named}))
    assert written(byte_level(), tmp_path, IDS)["tokenizer.chat_template"] == "for default"
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("for rag")
    values, notes = tokenizer_of(tmp_path, ROWS, IDS)
    assert values["tokenizer.chat_template"] == "for default"
    assert "llama.cpp has one chat template: without rag, tool_use" in notes
    settings.write_text('{"chat_template": [{"name": "default"}]}')
    with pytest.raises(FormatError, match="name without a template"):
        tokenizer_of(tmp_path, ROWS, IDS)
