"""Text into calibration segments."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantine.calibrate.bos import Bos
from quantine.calibrate.segments import (
    HELD_OUT,
    Calibration,
    calibration_segments,
    draw_segments,
)
from quantine.calibrate.token_stream import TokenStream
from quantine.errors import CalibrationError
from samples import quick
from tiny_models import BOS, byte_tokenizer


def letters(text: str, **_: Any) -> dict[str, list[int]]:
    """A tokenizer: one token per byte."""
    return {"input_ids": list(text.encode())}


def numbers(count: int, *begin: int) -> TokenStream:
    """A text whose tokens are their places, with tokens that every segment begins with."""
    return TokenStream(torch.tensor(begin, dtype=torch.int64), torch.arange(count))


@quick
@given(
    tokens=st.integers(2, 60),
    length=st.integers(1, 59),
    samples=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_segments_are_full_windows_of_the_stream(
    tokens: int, length: int, samples: int, seed: int
) -> None:
    if length > tokens:
        return
    segments = draw_segments(numbers(tokens), samples, length, seed, "text")
    assert segments.shape == (samples, length)
    assert segments.dtype == torch.int64
    for segment in segments:
        start = int(segment[0])
        assert segment.tolist() == list(range(start, start + length))
        assert start + length <= tokens
    assert torch.equal(segments, draw_segments(numbers(tokens), samples, length, seed, "x"))


@quick
@given(begin=st.integers(1, 3), length=st.integers(4, 20), seed=st.integers(0, 99))
def test_segments_begin_alike_and_are_of_the_text_behind(
    begin: int, length: int, seed: int
) -> None:
    first = [1000 + index for index in range(begin)]
    segments = draw_segments(numbers(60, *first), 5, length, seed, "text")
    assert segments.shape == (5, length)
    for segment in segments.tolist():
        start = segment[begin]
        assert segment == first + list(range(start, start + length - begin))


def test_seeds_differ_and_global_generators_are_left_alone() -> None:
    stream = numbers(10_000)
    states = random.getstate(), torch.get_rng_state()
    first, second = (draw_segments(stream, 8, 16, seed, "text") for seed in (0, 1))
    assert not torch.equal(first, second)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_more_samples_begin_with_the_same_ones() -> None:
    stream = numbers(10_000)
    few, many = (draw_segments(stream, samples, 16, 3, "text") for samples in (4, 9))
    assert torch.equal(many[:4], few)


@pytest.mark.parametrize("tokens", [0, 1, 63])
def test_text_shorter_than_one_segment_is_refused(tokens: int) -> None:
    with pytest.raises(CalibrationError, match=f"'my.txt' has {tokens} tokens.*segment of 64"):
        draw_segments(numbers(tokens), 4, 64, 0, "my.txt")


def test_a_segment_without_room_for_text_is_refused() -> None:
    assert draw_segments(numbers(9, 7), 1, 2, 0, "my.txt").tolist()[0][0] == 7
    with pytest.raises(CalibrationError, match="segment of 1 tokens has no room for text"):
        draw_segments(numbers(9, 7), 1, 1, 0, "my.txt")


@pytest.mark.parametrize(
    ("seqlen", "context", "expected"),
    [(None, None, 512), (None, 4096, 512), (None, 128, 128), (64, 128, 64), (128, 128, 128)],
)
def test_segment_length(seqlen: int | None, context: int | None, expected: int) -> None:
    assert Calibration(seqlen=seqlen).segment_length(context) == expected


def test_a_segment_longer_than_the_context_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"seqlen 129 exceeds .* 128 tokens"):
        Calibration(seqlen=129).segment_length(128)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"samples": -1}, "-1"),
        ({"samples": True}, "True"),
        ({"seqlen": 0}, "0"),
        ({"seed": -1}, "-1"),
        ({"seed": 2**70}, "118059162071741130"),
        ({"seed": None}, "None"),
        ({"seed": 1.5}, "1.5"),
        ({"bfloat16": 1}, "1"),
    ],
)
def test_numbers_out_of_range_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CalibrationError, match=f"{next(iter(fields))} must .*not {named}"):
        Calibration(**fields)


def test_from_file_to_segments(tmp_path: Path) -> None:
    path = tmp_path / "my.txt"
    path.write_text("the quick brown fox " * 20)
    calibration = Calibration(str(path), samples=5, seqlen=32, seed=7)
    segments = calibration_segments(calibration, letters, 256, 64)
    text = path.read_bytes()
    assert segments.shape == (5, 32)
    assert all(bytes(segment.tolist()) in text for segment in segments)


@pytest.mark.parametrize("bos", ["each", "first"])
def test_segments_begin_as_the_tokenizer_begins_a_text(tmp_path: Path, bos: Bos) -> None:
    path = tmp_path / "my.txt"
    path.write_text("the quick brown fox " * 20)
    calibration = Calibration(str(path), samples=9, seqlen=32, bos=bos)
    segments = calibration_segments(calibration, byte_tokenizer(), 300, 64)
    assert segments.shape == (9, 32)
    begun = segments[:, 0] == BOS
    assert int(begun.sum()) == (9 if bos == "each" else 0)
    assert (segments[:, 1:] != BOS).all()


def test_without_bos_both_protocols_are_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "my.txt"
    path.write_text("the quick brown fox " * 20)
    stream = path.read_bytes()
    ids = torch.tensor(byte_tokenizer(bos=False)(stream.decode())["input_ids"])
    generator = random.Random(3)
    starts = [generator.randint(0, len(ids) - 32 - 1) for _ in range(4)]
    expected = torch.stack([ids[start : start + 32] for start in starts])
    for bos in ("each", "first"):
        request = Calibration(str(path), samples=4, seqlen=32, seed=3, bos=bos)  # type: ignore[arg-type]
        found = calibration_segments(request, byte_tokenizer(bos=False), 300, 64)
        assert torch.equal(found, expected)


def test_what_judges_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "my.txt"
    path.write_bytes(bytes(range(32, 112)))  # every token is its place, but for 32
    request = Calibration(str(path), samples=200, seqlen=10)
    everything = calibration_segments(request, letters, 256, None)
    held = calibration_segments(request, letters, 256, None, holds_out=True)
    last = 32 + 80 - 80 // HELD_OUT
    assert everything.max() >= last > held.max()
    longest = calibration_segments(
        Calibration(str(path), 1, 70), letters, 256, None, holds_out=True
    )
    assert longest.tolist() == [list(range(32, last))]
    with pytest.raises(CalibrationError, match=r"80 tokens, .* 71 without the last 10, which comp"):
        calibration_segments(Calibration(str(path), 1, 71), letters, 256, None, holds_out=True)
    with pytest.raises(CalibrationError, match="has 80 tokens, too few for one segment of 81:"):
        calibration_segments(Calibration(str(path), 1, 81), letters, 256, None, holds_out=True)


def test_unknown_values_of_bos_are_refused() -> None:
    with pytest.raises(CalibrationError, match="bos must be each or first, not 'all'"):
        Calibration(bos="all")  # type: ignore[arg-type]


def test_absurd_amounts_are_refused_before_any_text_is_read() -> None:
    with pytest.raises(CalibrationError, match="use fewer"):
        calibration_segments(Calibration("no such text", samples=10**9, seqlen=64), None, 10, None)
