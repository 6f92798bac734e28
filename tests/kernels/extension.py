"""The native extension, which tests of kernels cannot do without."""

from __future__ import annotations

from typing import Any

from quantine.kernels import backend


def native() -> Any:
    """The extension."""
    found = backend.native()
    assert found is not None, "the native extension is off or missing: nothing to test"
    return found
