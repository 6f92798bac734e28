"""Runs that are interrupted while they work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from quantine.run.store import RunStore


@contextmanager
def stopped_at(part: str) -> Iterator[None]:
    """A context in which a run is interrupted before it commits ``part``, as it has to be."""
    commit = RunStore.commit

    def stopping(self: RunStore, name: str, *rest: Any) -> None:
        if name == part:
            raise KeyboardInterrupt
        commit(self, name, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunStore, "commit", stopping)
        with pytest.raises(KeyboardInterrupt):
            yield
