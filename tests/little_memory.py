"""A machine on which hidden states do not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from quantine.run import residence


@contextmanager
def little_memory(little: bool = True) -> Iterator[None]:
    """Runs in this context keep their hidden states on disk, if ``little``, and resume nothing."""
    with pytest.MonkeyPatch.context() as patch:
        if little:
            patch.setattr(residence, "DEFAULT_SHARE", 0.0)
        yield
