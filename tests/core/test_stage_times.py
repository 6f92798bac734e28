"""A stage gets its own time, not that of stages inside of it; nothing counts twice."""

from __future__ import annotations

import pytest

from quantine.core.stage_times import StageTimes


class Clock:
    """Stands for the module ``time``: time passes where a test says so, half of it in work."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.now / 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("quantine.core.stage_times.time", made)
    return made


def seconds(times: StageTimes) -> dict[str, float]:
    return {name: spent["seconds"] for name, spent in times.as_plain().items()}


def test_a_stage_inside_of_another_stops_its_clock(clock: Clock) -> None:
    times = StageTimes()
    with times.stage("outer"):
        clock.now += 1
        for _ in range(2):
            with times.stage("inner"):
                clock.now += 10
        clock.now += 2
    clock.now += 100  # nobody's
    with times.stage("outer"):
        clock.now += 4
    assert list(seconds(times).items()) == [("outer", 7.0), ("inner", 20.0)]
    assert times.as_plain()["inner"]["processor_seconds"] == 10


def test_an_error_ends_the_stage(clock: Clock) -> None:
    times = StageTimes()

    def fail() -> None:
        with times.stage("fails"):
            clock.now += 1
            raise KeyError

    with times.stage("outer"):
        with pytest.raises(KeyError):
            fail()
        clock.now += 2
    assert seconds(times) == {"outer": 2.0, "fails": 1.0}


def test_a_part_shares_the_clock_and_tells_its_stages_apart(clock: Clock) -> None:
    times = StageTimes()
    with times.stage("fits"), times.part("budget").stage("fits"):
        clock.now += 1
    assert seconds(times) == {"fits": 0.0, "budget: fits": 1.0}
