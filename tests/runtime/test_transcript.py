"""Answers as text: piece by piece as much as at once, and no less."""

from __future__ import annotations

from typing import Any

import pytest

from quantine.runtime.prompt import LONGEST, Transcript
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


@pytest.mark.parametrize("prompt", ["the ខ្មែរ", "日本語の本", "aខ្មែរខ្មែរខ្មែរ"])
@pytest.mark.parametrize("answer", [" they", "ខ្មែ they", "日"])
def test_characters_of_bytes_before_and_in_an_answer(prompt: str, answer: str) -> None:
    tokenizer = for_transformers(sentencepiece())
    ids = tokenizer(prompt)["input_ids"]
    continued = tokenizer(prompt + answer)["input_ids"]
    assert continued[: len(ids)] == ids
    transcript = Transcript(tokenizer, ids)
    made = [transcript.add(token) for token in continued[len(ids) :]]
    assert "".join(made) == answer
    assert transcript.rest() == ""


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
    found = pieces(Transcript(tokenizer, ids[:1]), ids[1:2])
    assert found == ["", "\N{REPLACEMENT CHARACTER}"]


def test_the_answer_may_end_a_character_that_the_prompt_began() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("café au lait", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(Transcript(tokenizer, ids[:4]), ids[4:])) == "é au lait"
    broken = [*ids[:4], *ids[5:]]  # the character that is begun is never ended
    assert "".join(pieces(Transcript(tokenizer, broken[:4]), broken[4:])) == " au lait"


def test_a_long_answer_is_not_decoded_anew_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = for_transformers(sentencepiece())
    text = " ".join(["there they thought of ខ្មែរ theatres, 日本語の本"] * 40)
    ids = tokenizer(text)["input_ids"]
    decoded: list[int] = []
    decode = type(tokenizer).decode

    def counted(self: Any, tokens: list[int], **options: Any) -> str:
        decoded.append(len(tokens))
        return decode(self, tokens, **options)

    monkeypatch.setattr(type(tokenizer), "decode", counted)
    transcript = Transcript(tokenizer, ids[:1])
    assert "".join(pieces(transcript, ids[1:])) == text
    assert len(transcript) == len(ids) - 1
    assert max(decoded) <= LONGEST + 3 * 30, "a run of bytes is decoded as a whole"
