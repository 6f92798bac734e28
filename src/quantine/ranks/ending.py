"""How a run of several processes ends when one of them fails: the others end, and one tells why."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, Final

from quantine.errors import DeviceMemoryError, QuantineError, RankError, cut, is_out_of_memory
from quantine.ranks.pulse import Pulse

SPEAKER: Final = "speaker"
"""Key in the store of the first rank that failed with a sentence, which it says for all."""
CAUSE: Final = "cause"
"""Key of what happened to a rank that failed without one."""
GO_ON: Final = "continue with --resume, with any number of ranks"
"""The remedy where a rank is gone."""
EXIT_SILENT: Final = 2
"""Exit status of a rank that leaves the sentence to another; that of an error of quantine."""


class Ending:
    """The end of a run for one of its ranks, by what the ranks leave in their store.

    Args:
        store: shared by all ranks.
        index: number of this rank.
        count: number of ranks.
    """

    def __init__(self, store: Any, index: int, count: int) -> None:
        self._store, self._index, self._count = store, index, count
        self.pulse = Pulse(store.clone(), index, count, self._left_alone)
        self._begun = False

    def said(self, error: BaseException) -> BaseException:
        """What a rank that fails with ``error`` ends with, now that the others know.

        Of all ranks only the first that fails with a sentence says it, as they often fail for one
        reason; the others exit in silence, with the status of such an error. An error that is no
        sentence, a bug, stays what it is.
        """
        self._begun = True
        if is_out_of_memory(error) and not isinstance(error, QuantineError):
            error = DeviceMemoryError(
                f"rank {self._index} ran out of memory ({cut(error)}): {GO_ON}, fewer on a machine"
            )
        if isinstance(error, QuantineError):
            return error if self._speaks() else SystemExit(EXIT_SILENT)
        with _store_may_be_gone():
            self._store.set(CAUSE, f"rank {self._index} failed ({cut(repr(error))})")
        return error

    def lost(self, error: BaseException) -> str:
        """The sentence of a rank that saw ``error`` when it waited for others."""
        self._begun = True
        return self._sentence(self._missing(), cut(error))

    def signalled(self) -> None:
        """End this rank because it is told to, as torchrun does when another one is gone.

        Raises:
            RankError: says which one.
        """
        if not self._begun:
            self._begun = True
            raise RankError(self._sentence(self._missing(), "it was told to end"))

    def _missing(self) -> list[int]:
        """The ranks that are gone, where none has said or shown what happened."""
        with _store_may_be_gone():
            if self._store.check([SPEAKER]) or self._store.check([CAUSE]):
                return []
        return self.pulse.missing()

    def _sentence(self, missing: list[int], seen: str) -> str:
        """Which ranks are gone, and what now."""
        with _store_may_be_gone():
            if self._store.check([CAUSE]):
                return f"{self._store.get(CAUSE).decode()}: mend that and {GO_ON}"
        if not missing:
            return f"rank {self._index} lost the others ({seen}): {GO_ON}"
        names = ", ".join(map(str, missing))
        ranks = f"rank {names}" if len(missing) == 1 else f"ranks {names}"
        return f"{ranks} of {self._count} ended or hung: {GO_ON}"

    def _left_alone(self, silent: list[int]) -> None:
        """End this process, whose main thread waits for ranks that hang, and cannot be told."""
        if self._speaks():
            sys.stderr.write(f"quantine: {self._sentence(silent, '')}\n")
            sys.stderr.flush()
        os._exit(EXIT_SILENT)

    def _speaks(self) -> bool:
        """Whether this is the first rank that wants to say why the run ends."""
        own = str(self._index)
        with _store_may_be_gone():
            return bool(self._store.compare_set(SPEAKER, "", own).decode() == own)
        return True


@contextlib.contextmanager
def _store_may_be_gone() -> Iterator[None]:
    """The process that has the store may be the one that was lost; ranks then end without it."""
    with contextlib.suppress(RuntimeError, OSError):
        yield
