"""The time that a part of `make gpu` may take, and what is left out once it is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
"""What was found of one thing, by name."""


@dataclass
class Allowance:
    """Time until ``end``, by ``clock``, both in seconds.

    Attributes:
        left_out: names of what was not done because no time was left.
        failed: names of what failed, and how.
    """

    end: float
    clock: Callable[[], float] = time.monotonic
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds that are left, 0 where it is over."""
        return max(0.0, self.end - self.clock())

    def allows(self, name: str) -> bool:
        """Whether there is time to do what is called ``name``; else it is left out."""
        if self.left:
            return True
        self.left_out.append(name)
        return False

    def demand(self, holds: bool, what: str) -> None:
        """Note that ``what`` failed unless it ``holds``; a part that has such a note failed."""
        if not holds:
            self.failed.append(what)

    def rows(self, name: str, find: Callable[[], list[Row]]) -> list[Row]:
        """What ``find`` finds; nothing where no time is left, or where it fails, which is noted."""
        if not self.allows(name):
            return []
        try:
            return find()
        except Exception as error:  # what else is found must not be lost
            self.failed.append(f"{name}: {error}")
            return []
