"""Stop strings do not depend on how a text is cut into pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quantine.server.stops import StopFilter

SHORT = st.text("ab", max_size=12)


@given(st.lists(SHORT), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_pieces_end_where_the_whole_text_does(pieces: list[str], stops: list[str]) -> None:
    passing = StopFilter(stops)
    passed = ""
    for piece in pieces:
        passed += passing.add(piece)
        if passing.stopped:
            break
    text = "".join(pieces)
    found = [text.index(stop) for stop in stops if stop in text]
    assert passing.stopped == bool(found)
    # With two stop strings, what counts is the one that is whole first, as pieces arrive.
    if len(stops) < 2:
        assert passed + passing.rest() == (text[: found[0]] if found else text)
    assert text.startswith(passed + passing.rest())
    assert not any(stop in passed for stop in stops)


def test_what_may_begin_a_stop_string_waits() -> None:
    passing = StopFilter(["END.", "stop"])
    assert [passing.add(text) for text in ("one E", "N", "Z s", "top")] == ["one ", "", "ENZ ", ""]
    assert passing.stopped
