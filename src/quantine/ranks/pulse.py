"""The sign of life that a rank gives, also while it waits or computes, and what it hears of others.

What is connected may still hang: a stopped process, a machine without a network. And a rank that
waits for another does not know whether that one is gone or waits for a third.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from quantine.errors import BackendUnavailable

BEAT: Final = 0.5
"""Seconds between two signs of life, which are the number of the beat."""
SILENCE: Final = 240
"""Number of own beats after which a rank that gives none is taken for lost."""
ALIVE: Final = 3
"""Number of beats of a rank that is alive: of one that is not, a last one may still arrive."""
ROLL_CALL: Final = 5.0
"""Seconds in which so many are heard."""
ENDED: Final = -1
"""Sign of a rank that has done all its work."""


class Pulse:
    """A thread that gives this rank's signs of life, and listens to those of the others.

    Args:
        store: shared by all ranks, and used by this thread alone.
        index: number of this rank.
        count: number of ranks.
        on_silence: called in the thread, once, with the numbers of ranks that are silent.
    """

    def __init__(
        self, store: Any, index: int, count: int, on_silence: Callable[[list[int]], None]
    ) -> None:
        self._store, self._index, self._on_silence = store, index, on_silence
        self._others = [rank for rank in range(count) if rank != index]
        self._heard = dict.fromkeys(self._others, 0)
        self._silent = dict.fromkeys(self._others, 0)  # own beats since the last sign
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="quantine-pulse", daemon=True)
        self._store.set(str(index), "0")

    def begin(self, patience: timedelta) -> None:
        """Wait until all ranks have given their first sign, and begin to listen.

        Raises:
            BackendUnavailable: after so long, some have not.
        """
        try:
            self._store.wait([str(rank) for rank in self._others], patience)
        except RuntimeError as error:
            raise BackendUnavailable(
                f"rank {self._index} waited {patience} for the others in vain: start all of them"
            ) from error
        self._thread.start()

    def end(self) -> None:
        """Give no more signs; the others expect none."""
        self._done.set()
        self._thread.join()

    def missing(self) -> list[int]:
        """The ranks that give no sign of life for `ROLL_CALL` seconds."""
        before, until = dict(self._heard), time.monotonic() + ROLL_CALL
        missing = self._others
        while missing and time.monotonic() < until and self._thread.is_alive():
            time.sleep(BEAT / 5)
            missing = [
                rank
                for rank in missing
                if self._heard[rank] != ENDED and self._heard[rank] < before[rank] + ALIVE
            ]
        return missing

    def _beat(self) -> None:
        beats = 0
        try:
            while not self._done.wait(BEAT):
                beats += 1
                self._store.set(str(self._index), str(beats))
                self._listen()
            self._store.set(str(self._index), str(ENDED))
        except RuntimeError:  # the store is gone, and with it a rank; who waits for that notices
            return

    def _listen(self) -> None:
        signs = self._store.multi_get([str(rank) for rank in self._others])
        for rank, sign in zip(self._others, map(int, signs), strict=True):
            new = sign == ENDED or sign != self._heard[rank]
            self._silent[rank] = 0 if new else self._silent[rank] + 1
            self._heard[rank] = sign
        silent = [rank for rank, beats in self._silent.items() if beats == SILENCE]
        if silent:
            self._on_silence(silent)
