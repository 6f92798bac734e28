"""How a run of several processes ends when one of them fails: the others end, and one tells why."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Final

import torch.distributed as dist

from quantine.errors import DeviceMemoryError, QuantineError, RankError, cut, is_out_of_memory

ROLL_CALL: Final = 5.0
"""Seconds in which the ranks that are left report, so that the lost ones can be named."""
SPEAKER: Final = "speaker"
"""Key in the store of the first rank that failed with a sentence, which it prints for all."""
CAUSE: Final = "cause"
"""Key of what happened to a rank that failed without one."""
HERE: Final = "here"
"""Key, with the number of a rank, that says that it is left when another was lost."""
GO_ON: Final = "continue with --resume, with any number of ranks"
"""The remedy where a rank is gone."""


class Ending:
    """The end of a run for one of its ranks, by what the ranks leave in their store.

    Args:
        store: shared by all ranks; other keys may be in it.
        index: number of this rank.
        count: number of ranks.
    """

    def __init__(self, store: Any, index: int, count: int) -> None:
        self._store, self._index, self._count = store, index, count
        self.begun = False

    def said(self, error: BaseException) -> BaseException:
        """What a rank that ends with ``error`` ends with, now that the others know.

        Of all ranks only the first that fails with a sentence says it, as they often fail for one
        reason; the others exit in silence, with the status of such an error. An error that is no
        sentence, a bug, stays what it is.
        """
        self.begun = True
        if is_out_of_memory(error) and not isinstance(error, QuantineError):
            error = DeviceMemoryError(
                f"rank {self._index} ran out of memory ({cut(error)}): {GO_ON}, fewer on a machine"
            )
        if isinstance(error, QuantineError):
            return error if self._speaks() else SystemExit(2)
        with _store_may_be_gone():
            self._store.set(CAUSE, f"rank {self._index} failed ({cut(repr(error))})")
        return error

    def lost(self, error: BaseException | None = None) -> str:
        """The sentence of a rank that others do not answer: which of them are gone, and what now.

        Args:
            error: what this rank saw of it.
        """
        self.begun = True
        with contextlib.suppress(RuntimeError, AssertionError):
            dist.destroy_process_group()  # so that ranks that wait for this one notice, too
        with _store_may_be_gone():
            missing = self._missing()
            if self._store.check([CAUSE]):
                return f"{self._store.get(CAUSE).decode()}: mend that and {GO_ON}"
            if missing and not self._store.check([SPEAKER]):
                names = ", ".join(map(str, missing))
                ranks = "rank" if len(missing) == 1 else "ranks"
                return f"{ranks} {names} of {self._count} ended or did not answer: {GO_ON}"
        seen = "it was ended" if error is None else cut(error)
        return f"rank {self._index} lost the others ({seen}): {GO_ON}"

    def _speaks(self) -> bool:
        with _store_may_be_gone():
            own = str(self._index)
            return bool(self._store.compare_set(SPEAKER, "", own).decode() == own)
        return True

    def _missing(self) -> list[int]:
        """The ranks that do not say that they are left; all do that at once, or never."""
        self._store.set(f"{HERE}{self._index}", "")
        missing = [rank for rank in range(self._count) if rank != self._index]
        until = time.monotonic() + ROLL_CALL
        while missing and time.monotonic() < until:
            if self._store.check([SPEAKER]) or self._store.check([CAUSE]):
                break
            missing = [rank for rank in missing if not self._store.check([f"{HERE}{rank}"])]
            time.sleep(0.05)
        return missing


@contextlib.contextmanager
def _store_may_be_gone() -> Iterator[None]:
    """The store's process may be the one that was lost; then ranks end without it."""
    with contextlib.suppress(RuntimeError, OSError):
        yield


def ended_by_signal(ending: Ending) -> None:
    """End this rank because torchrun asks for it, which it does when another one is gone.

    Raises:
        RankError: says which one.
    """
    if not ending.begun:
        raise RankError(ending.lost())
