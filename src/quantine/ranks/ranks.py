"""What the processes of a run tell each other, and what that is where there is only one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

from torch import Tensor

from quantine.errors import PlanError

T = TypeVar("T")


class Ranks:
    """The one process of a run that is not shared. `quantine.ranks.torch_ranks` has several.

    All ranks of a run call the same methods in the same order.

    Attributes:
        index: number of this process, from 0.
        count: number of processes.
    """

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, prints, and decides for all."""
        return self.index == 0

    def owner(self, number: int) -> int:
        """The rank that does piece ``number`` of work that is dealt out in turn."""
        return number % self.count

    def share(self, pieces: int) -> range:
        """The numbers of this rank's pieces of work that is dealt out in consecutive parts."""
        first, end = (pieces * rank // self.count for rank in (self.index, self.index + 1))
        return range(first, end)

    def of_rank(self, rank: int, make: Callable[[], T]) -> T:
        """What ``make`` gives on ``rank``, on every rank; the others do not call it."""
        return make()

    def of_first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on the first rank, on every rank."""
        return self.of_rank(0, make)

    def gather(self, value: T) -> list[T]:
        """The ``value`` of each rank, on every rank, in their order."""
        return [value]

    def total(self, parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
        """The sums of lists of tensors of the same shapes, on every rank.

        The parts are added one after another, those of the first rank first, so that the sums do
        not depend on how many ranks there are and how many parts each has.

        Args:
            parts: at least one, and the same number of tensors in each; they may be changed.
        """
        rest = iter(parts)
        sums = list(next(rest))
        add_to(sums, rest)
        return sums

    def meet(self) -> None:
        """Wait until all ranks have come here."""

    def agree(self, facts_of_this: Callable[[], dict[str, Any]]) -> None:
        """Check that all ranks have the same facts, by what they describe.

        Args:
            facts_of_this: gives those of this rank; not called where there is only one.

        Raises:
            PlanError: a rank has others; names it, and what differs.
        """
        if self.count == 1:
            return
        facts = facts_of_this()
        for rank, other in enumerate(self.gather(facts)):
            keys = [key for key in {**facts, **other} if facts.get(key) != other.get(key)]
            if keys:
                raise PlanError(
                    f"ranks {self.index} and {rank} have another {', '.join(sorted(keys)[:4])}: "
                    "give all of them the same model, text, software and kind of machine"
                )


def add_to(sums: Sequence[Tensor], parts: Iterable[Sequence[Tensor]]) -> None:
    """Add the tensors of all ``parts`` to ``sums`` in place, one part after another."""
    for part in parts:
        for total, one in zip(sums, part, strict=True):
            total += one


ALONE: Final = Ranks()
"""The one process of a run that is not shared."""
