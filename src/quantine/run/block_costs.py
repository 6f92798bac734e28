"""What each block of a run took: time and memory, for the report."""

from __future__ import annotations

import time
from typing import Any, Final

from quantine.core.process_memory import peak_memory, resident_memory
from quantine.run.store import RunStore

COSTS: Final = "costs"
"""Name under which a run stores what its blocks took, so that a process that goes on knows it."""


class BlockCosts:
    """Measures one block after another, and keeps what is measured in the run's directory.

    Args:
        store: the open run.
    """

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._began = self._worked = 0.0

    def begin(self) -> None:
        """Start the clock: the work on a block begins."""
        self._began, self._worked = time.perf_counter(), time.process_time()

    def end(self, index: int) -> None:
        """Store what block ``index`` took, whose weights are released."""
        found = {
            "block": index,
            "seconds": round(time.perf_counter() - self._began, 3),
            "processor_seconds": round(time.process_time() - self._worked, 3),
            "peak_memory_bytes": peak_memory(),
            "memory_after_bytes": resident_memory(),
        }
        self._store.remember(COSTS, [*stored_costs(self._store), found])


def stored_costs(store: RunStore) -> list[dict[str, Any]]:
    """What blocks took, in the order in which they were finished; see ``docs/format.md``.

    A block whose process was killed right after it had been committed is missing.
    """
    found: list[dict[str, Any]] = store.recall(COSTS) or []
    return found
