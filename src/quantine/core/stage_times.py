"""What each stage of a piece of work took: its own time, without that of stages inside of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace


@dataclass
class _Spent:
    """Time of one stage so far: by the clock, and of this process on all processors, in seconds."""

    seconds: float = 0.0
    processor: float = 0.0


@dataclass
class _Clock:
    """Gives the time that passes to the stage that is innermost.

    Attributes:
        spent: what stages took so far, by name.
        inside: stages that have begun and not ended, the innermost last.
        since: when time was last given away, by the clock and of the process.
    """

    spent: dict[str, _Spent] = field(default_factory=dict)
    inside: list[_Spent] = field(default_factory=list)
    since: tuple[float, float] = (0.0, 0.0)

    def give(self) -> None:
        """Give the time since the last call to the innermost stage, if there is one."""
        now = time.perf_counter(), time.process_time()
        if self.inside:
            self.inside[-1].seconds += now[0] - self.since[0]
            self.inside[-1].processor += now[1] - self.since[1]
        self.since = now


@dataclass(frozen=True)
class StageTimes:
    """A clock that one stage at a time has; a stage inside of another stops the outer one's.

    It is for one thread: what others of the process work meanwhile counts as processor time of the
    stage that has the clock.
    """

    _clock: _Clock = field(default_factory=_Clock)
    _before: str = ""

    def part(self, name: str) -> StageTimes:
        """The same clock for a part of the work, whose stages are told apart by ``name``."""
        return replace(self, _before=f"{self._before}{name}: ")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time inside of the context as that of the stage ``name``."""
        clock = self._clock
        clock.give()
        clock.inside.append(clock.spent.setdefault(self._before + name, _Spent()))
        try:
            yield
        finally:
            clock.give()
            clock.inside.pop()

    def as_plain(self) -> dict[str, dict[str, float]]:
        """``seconds`` and ``processor_seconds`` by stage, in the order in which stages began."""
        return {
            name: {
                "seconds": round(spent.seconds, 3),
                "processor_seconds": round(spent.processor, 3),
            }
            for name, spent in self._clock.spent.items()
        }
