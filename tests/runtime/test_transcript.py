"""Answers as text: piece by piece as much as at once, and no less."""

from __future__ import annotations

import pytest

from quantine.runtime.prompt import Transcript
from sentencepieces import for_transformers, sentencepiece
from tiny_models import byte_tokenizer


def pieces(transcript: Transcript, tokens: list[int]) -> list[str]:
    return [*(transcript.add(token) for token in tokens), transcript.rest()]


@pytest.mark.parametrize("cut", range(2, 9))
def test_spaces_where_an_answer_begins(cut: int) -> None:
    tokenizer = for_transformers(sentencepiece())
    ids = tokenizer("there they thought of other theatres")["input_ids"]
    before = tokenizer.decode(ids[:cut], skip_special_tokens=True)
    transcript = Transcript(tokenizer, ids[:cut])
    answer = "".join(pieces(transcript, ids[cut:]))
    assert before + answer == "there they thought of other theatres"
    assert len(transcript) == len(ids) - cut


def test_an_answer_after_special_tokens_alone_begins_as_a_text() -> None:
    tokenizer = for_transformers(sentencepiece())
    ids = tokenizer("there they")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert "".join(pieces(Transcript(tokenizer, ids[:1]), ids[1:])) == "there they"


def test_what_a_character_lacks_is_said_in_the_end() -> None:
    tokenizer = byte_tokenizer()
    text = "x\N{REPLACEMENT CHARACTER}"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(pieces(Transcript(tokenizer, []), ids)) == text
    ids = tokenizer("xé", add_special_tokens=False)["input_ids"]
    assert pieces(Transcript(tokenizer, ids[:1]), ids[1:]) == ["", "é", ""]
    assert pieces(Transcript(tokenizer, ids[:2]), ids[2:])[0] == "é"
    found = pieces(Transcript(tokenizer, ids[:1]), ids[1:2])
    assert found == ["", "\N{REPLACEMENT CHARACTER}"]
