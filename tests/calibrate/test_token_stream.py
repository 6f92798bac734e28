"""A text as tokens, and what tokenizers put around every text."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import processors

from quantine.calibrate.bos import BOS_CHOICES, Bos
from quantine.calibrate.token_stream import Frame, begun, frame_of, token_stream
from quantine.errors import CalibrationError, ending
from tiny_models import BOS, EOS, byte_tokenizer

TEMPLATES: dict[str, tuple[str, Frame]] = {
    "nothing": ("$A", Frame((), ())),
    "BOS": ("<s> $A", Frame((BOS,), ())),
    "EOS": ("$A </s>", Frame((), (EOS,))),
    "both": ("<s> $A </s>", Frame((BOS,), (EOS,))),
    "two tokens": ("<s> </s> $A", Frame((BOS, EOS), ())),
}


def tokenizer_with(template: str) -> Any:
    tokenizer = byte_tokenizer(bos=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


def plain(text: str) -> list[int]:
    ids: list[int] = byte_tokenizer(bos=False)(text)["input_ids"]
    return ids


@pytest.mark.parametrize(("template", "frame"), TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("text", ["abc", "<s>a</s>", "<s>", ""])
def test_every_piece_begins_as_a_text_and_none_ends_as_one(
    template: str, frame: Frame, text: str
) -> None:
    tokenizer = tokenizer_with(template)
    assert frame_of(tokenizer) == frame
    stream = token_stream(tokenizer, text, 300, "my.txt")
    assert tuple(stream.begin.tolist()) == frame.before
    assert stream.tokens.tolist() == plain(text)
    first = token_stream(tokenizer, text, 300, "my.txt", "first")
    assert first.begin.tolist() == []
    assert first.tokens.tolist() == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("bos", BOS_CHOICES)
def test_results_say_how_pieces_begin_only_where_it_matters(bos: Bos) -> None:
    assert begun(byte_tokenizer(), bos) == bos
    assert begun(tokenizer_with("$A </s>"), bos) == "none"


def test_pieces_are_full() -> None:
    stream = token_stream(byte_tokenizer(), "abcdefgh", 300, "my.txt")
    assert stream.text_length(4) == 3
    a = plain("abcdefgh")
    assert stream.pieces([0, 3], 4).tolist() == [[BOS, *a[:3]], [BOS, *a[3:6]]]


def test_a_tokenizer_may_know_no_latin_letters() -> None:
    def greek(text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = [ord(letter) - 0x3B1 for letter in text if ord(letter) >= 0x3B1]
        return {"input_ids": [90, *ids] if add_special_tokens else ids}

    stream = token_stream(greek, "\u03b1\u03b2\u03b3", 99, "my.txt")
    assert (stream.begin.tolist(), stream.tokens.tolist()) == ([90], [0, 1, 2])


@pytest.mark.parametrize("inner", [[7], []])
def test_a_tokenizer_that_does_not_show_its_beginning_is_refused(inner: list[int]) -> None:
    def odd(text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [9, 8] if add_special_tokens else inner}

    with pytest.raises(CalibrationError, match="does not show what it puts around"):
        token_stream(odd, "abc", 99, "my.txt")


@pytest.mark.parametrize("number", [98, -1])
def test_a_tokenizer_of_another_model_is_refused(number: int) -> None:
    def constant(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [number] * len(text)}

    said = rf"id {number} for text 'my\.txt', but the model knows 98"
    with pytest.raises(CalibrationError, match=said):
        token_stream(constant, "b", 98, "my.txt")


def test_a_tokenizer_that_fails_is_named_with_the_text() -> None:
    def failing(text: str, **_: Any) -> Any:
        raise TypeError(f"TextInputSequence must be str, not {text * 1000}")

    with pytest.raises(CalibrationError, match=r"fails on the text 'my\.txt' \(TypeError\)") as one:
        token_stream(failing, "secret", 98, "my.txt")
    assert "secret" not in str(one.value)


def test_a_lack_of_memory_is_what_it_is() -> None:
    def hungry(text: str, **_: Any) -> Any:
        raise MemoryError

    with pytest.raises(MemoryError):
        token_stream(hungry, "abc", 98, "my.txt")


def test_halves_of_characters_are_refused() -> None:
    with pytest.raises(
        CalibrationError, match=r"'my\.txt' holds half of a surrogate pair \(U\+D83D"
    ):
        token_stream(byte_tokenizer(), "a\ud83db", 300, "my.txt")


def test_long_names_are_shown_by_their_end() -> None:
    assert ending("a.txt") == "a.txt"
    assert ending("x" * 5000 + "/a.txt") == "…" + "x" * 94 + "/a.txt"
