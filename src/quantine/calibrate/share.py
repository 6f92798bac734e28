"""The part of a run's work that one of several processes does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

from quantine.errors import PlanError


@dataclass(frozen=True)
class Share:
    """The part of one process in work that several share.

    The statistics of all parts, merged, are those of the whole, see `quantine.statistics`. Raises
    `PlanError` if ``rank`` is not from 0 to ``count - 1``.

    Attributes:
        rank: number of the process, from 0.
        count: number of processes; 1 is one process that does everything.
    """

    rank: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise PlanError(f"rank must be from 0 to {self.count - 1}, not {self.rank}")

    def segments(self, segments: Tensor) -> Tensor:
        """The segments of this process: consecutive rows of ``segments`` ``[samples, seqlen]``."""
        bounds = [len(segments) * rank // self.count for rank in (self.rank, self.rank + 1)]
        return segments[slice(*bounds)]

    def owns(self, number: int) -> bool:
        """Whether this process does piece ``number`` of work that is dealt out in turn."""
        return number % self.count == self.rank


EVERYTHING: Final = Share()
"""The share of a process that does all of a run's work."""
