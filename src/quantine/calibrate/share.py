"""Which part of a run's work one of several processes does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

from quantine.errors import PlanError


@dataclass(frozen=True)
class Share:
    """A process's part of work that is split over several.

    Statistics of the parts merge to those of the whole, see `quantine.statistics`.

    Attributes:
        rank: number of the process, from 0.
        count: processes; one does everything.
    """

    rank: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise PlanError(f"rank must be from 0 to {self.count - 1}, not {self.rank}")

    def segments(self, segments: Tensor) -> Tensor:
        """The process's own of ``segments`` ``[samples, seqlen]``: a run of them, in order."""
        bounds = [len(segments) * rank // self.count for rank in (self.rank, self.rank + 1)]
        return segments[slice(*bounds)]

    def owns(self, number: int) -> bool:
        """Whether the process does piece ``number`` of pieces that are dealt out in turn."""
        return number % self.count == self.rank


EVERYTHING: Final = Share()
"""The share of the only process of a run."""
