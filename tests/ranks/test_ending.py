"""How ranks learn of each other's ends, with ranks that are threads of this process."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from quantine import BackendUnavailable, CalibrationError, DeviceMemoryError, RankError
from quantine.ranks import pulse
from quantine.ranks.ending import Ending


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Ending]]:
    """Three ranks that have begun to give signs of life."""
    monkeypatch.setattr(pulse, "BEAT", 0.02)
    monkeypatch.setattr(pulse, "ROLL_CALL", 2.0)
    store: Any = dist.HashStore()
    endings = [Ending(store, index, 3) for index in range(3)]
    for ending in endings:
        ending.pulse.begin(timedelta(seconds=1))
    yield endings
    for ending in endings:
        ending.pulse.end()


def killed(ending: Ending) -> None:
    """Let a rank end without its last sign."""
    ending.pulse._store = type("Gone", (), {"set": _fails, "multi_get": _fails})()
    ending.pulse._thread.join()


def _fails(*_: object) -> None:
    raise RuntimeError


def test_a_lost_rank_is_named(three: list[Ending]) -> None:
    killed(three[1])
    assert three[0].lost(RuntimeError("closed")).startswith("rank 1 of 3 ended or hung: continue")
    with pytest.raises(RankError, match="rank 1 of 3 ended or hung: continue with --resume"):
        three[2].signalled()
    three[2].signalled()  # once is enough


def test_ranks_that_are_left_are_not_taken_for_lost(three: list[Ending]) -> None:
    assert three[0].lost(RuntimeError("closed")).startswith("rank 0 lost the others (closed)")
    three[2].pulse.end()  # all its work is done
    assert three[1].pulse.missing() == []


def test_only_the_first_says_why(three: list[Ending]) -> None:
    error = CalibrationError("the text is too short")
    assert three[1].said(error) is error
    other = three[0].said(CalibrationError("the text is too short"))
    assert isinstance(other, SystemExit)
    assert other.code == 2


def test_memory_that_ran_out_is_a_sentence(three: list[Ending]) -> None:
    said = three[2].said(MemoryError("cannot allocate memory"))
    assert isinstance(said, DeviceMemoryError)
    assert str(said).startswith("rank 2 ran out of memory (cannot allocate memory): continue")


def test_what_happened_to_a_rank_is_told_by_another(three: list[Ending]) -> None:
    bug = KeyError("a bug")
    assert three[1].said(bug) is bug
    said = three[0].lost(RuntimeError("closed"))
    assert said.startswith("rank 1 failed (KeyError('a bug')): mend that and continue")


def test_ranks_that_do_not_come_are_not_waited_for() -> None:
    store: Any = dist.HashStore()
    with pytest.raises(
        BackendUnavailable, match=r"rank 0 waited 0:00:00.1.* for the others in vain"
    ):
        Ending(store, 0, 2).pulse.begin(timedelta(seconds=0.1))


def test_silence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "BEAT", 0.01)
    monkeypatch.setattr(pulse, "SILENCE", 5)
    store: Any = dist.HashStore()
    heard: list[list[int]] = []
    listening = pulse.Pulse(store, 0, 2, heard.append)
    store.set("1", "7")  # of a rank that hangs from then on
    listening.begin(timedelta(seconds=1))
    while not heard:
        assert listening._thread.is_alive()
    listening.end()
    assert heard == [[1]]
