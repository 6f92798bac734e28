"""Tokenizers of SentencePiece's kind in GGUF files find the words that they found before."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from quantine import Calibration, Plan, quantize
from quantine.errors import FormatError
from quantine.formats.export import export
from quantine.formats.foreign.gguf.tokenizer import tokenizer_of
from quantine.source.locate import locate
from sentencepieces import for_transformers, sentencepiece, with_metaspace
from tiny_models import build, tiny_config

ROWS = 424
IDS = {"bos_token_id": 1, "eos_token_id": 2}
TEXTS = [
    "there they thought of other theatres",
    "  two spaces, a\ttab\n\nand lines ",
    "naïve 日本 🦊 ß \u0301 aaaaaaa",
    "",
    " ",
]
Change = Callable[[dict[str, Any]], Any]


def written(tokenizer: Any, tmp_path: Path, change: Change | None = None) -> Any:
    """What a GGUF file says of ``tokenizer``, changed."""
    found = json.loads(tokenizer.to_str())
    if change is not None:
        change(found)
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    return tokenizer_of(tmp_path, ROWS, IDS)


def read(values: dict[str, Any], text: str) -> list[int]:
    """The words of ``text``, slowly, as llama.cpp finds them: the best pair is joined, the leftmost
    of equals."""
    numbers = {word: row for row, word in enumerate(values["tokenizer.ggml.tokens"])}
    scores = values["tokenizer.ggml.scores"]
    if not text:
        return []
    pieces = list(" " + text if values["tokenizer.ggml.add_space_prefix"] else text)
    pieces = ["▁" if piece == " " else piece for piece in pieces]
    while True:
        joined = [a + b for a, b in itertools.pairwise(pieces)]
        found = [i for i, word in enumerate(joined) if word in numbers]
        if not found:
            break
        best = max(found, key=lambda i: (scores[numbers[joined[i]]], -i))
        pieces[best : best + 2] = [joined[best]]
    ids = []
    for piece in pieces:
        byte = [numbers[f"<0x{byte:02X}>"] for byte in piece.encode()]
        ids += [numbers[piece]] if piece in numbers else byte
    return ids


def test_the_same_words(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    values, notes = written(tokenizer, tmp_path)
    assert not notes
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.add_bos_token"]
    assert values["tokenizer.ggml.unknown_token_id"] == 0
    assert values["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert values["tokenizer.ggml.token_type"][-1] == 5
    own = for_transformers(tokenizer)
    pick = random.Random(0)
    letters = "the aonqu.日é\n"
    texts = [*TEXTS, *("".join(pick.choices(letters, k=40)) for _ in range(40))]
    for text in texts:
        assert read(values, text) == own(text, add_special_tokens=False)["input_ids"], text


def test_metaspace_differs_where_it_says(tmp_path: Path) -> None:
    tokenizer = with_metaspace(sentencepiece())
    values, notes = written(tokenizer, tmp_path)
    assert "begins with a space" in notes[0]
    own = for_transformers(tokenizer)
    for text in TEXTS:
        same = read(values, text) == own(text, add_special_tokens=False)["input_ids"]
        assert same != text.startswith(" "), text


def no_prefix(found: dict[str, Any]) -> None:
    found["normalizer"] = found["normalizer"]["normalizers"][1]


def test_no_prefix(tmp_path: Path) -> None:
    values, _ = written(sentencepiece(), tmp_path, no_prefix)
    assert values["tokenizer.ggml.add_space_prefix"] is False


REFUSED: dict[str, tuple[Change, str]] = {
    "a byte": (lambda t: t["model"]["vocab"].pop("<0x41>"), "no word for 1 bytes, such as <0x41>"),
    "a way": (lambda t: t["model"]["merges"].pop(20), "which llama.cpp does"),
    "an order": (lambda t: t["model"]["merges"].append(t["model"]["merges"][0]), "several places"),
    "an ending": (lambda t: t["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "spaces": (lambda t: t.update(normalizer={"type": "NFKC"}), "NFKC"),
    "a kind": (lambda t: t["model"].update(type="Unigram"), "only BPE"),
    "merges": (lambda t: t["model"].update(merges=5), "cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_other_words_is_refused(name: str, tmp_path: Path) -> None:
    change, said = REFUSED[name]
    with pytest.raises(FormatError, match=said) as refused:
        written(sentencepiece(), tmp_path, change)
    assert str(tmp_path) in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("prefix", [True, False])
def test_files_are_read_again(prefix: bool, tmp_path: Path) -> None:
    model = build(tiny_config("llama", vocab_size=ROWS, bos_token_id=1), tmp_path / "model")
    made = json.loads(sentencepiece().to_str())
    if not prefix:
        no_prefix(made)
        made["decoder"]["decoders"].pop()  # which takes the first space off
    own = for_transformers(Tokenizer.from_str(json.dumps(made)))
    own.save_pretrained(model)
    plan = Plan.preset("rtn", group_size=32)
    out = quantize(model, tmp_path / "out", plan, Calibration(samples=0)).path
    file = export(out, tmp_path / "gguf", "gguf").path / "model.gguf"
    found = locate(file).tokenizer()
    for text in [*TEXTS, "there</s> they</s>they"]:
        ids = own(text)["input_ids"]
        assert found(text)["input_ids"] == ids, text
        assert found.decode(ids) == own.decode(ids), text
