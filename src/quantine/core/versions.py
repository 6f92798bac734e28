"""Versions of the installed packages that decide what is computed."""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Final

COMPUTING: Final = ("quantine", "torch", "transformers")
"""Packages that an output depends on."""


def computing_versions() -> dict[str, str]:
    """The version of each package in `COMPUTING`, which outputs record."""
    return {name: _version_of(name) for name in COMPUTING}


@functools.cache
def _version_of(package: str) -> str:
    """The version of an installed package. Its description takes milliseconds to read: once.

    Raises:
        importlib.metadata.PackageNotFoundError: it is not installed.
    """
    return version(package)
