"""Which kernels exist on this machine.

``QUANTINE_BACKEND=reference`` turns the native extension off; ``native`` insists on it.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import Final

import torch

from quantine.errors import BackendUnavailable

VARIABLE: Final = "QUANTINE_BACKEND"
CHOICES: Final = ("auto", "native", "reference")


@functools.cache
def native() -> ModuleType | None:
    """The native extension, or ``None`` where the PyTorch reference has to serve.

    Raises:
        BackendUnavailable: the environment insists on an extension that cannot be loaded, or names
            a backend that does not exist.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise BackendUnavailable(f"{VARIABLE}={choice!r} is not one of {', '.join(CHOICES)}")
    if choice == "reference":
        return None
    try:
        return importlib.import_module("quantine._native")
    except ImportError as error:
        if choice == "native":
            raise BackendUnavailable(
                f"{VARIABLE}=native, but the extension cannot be loaded ({error}): "
                "reinstall quantine with a C++17 compiler"
            ) from error
        warnings.warn(
            f"quantine's native extension cannot be loaded ({error}); the slower PyTorch "
            "reference is used",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def is_recorded() -> bool:
    """Whether PyTorch records the computation: kernels, and choices by values, would be lost."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return tracing or torch.compiler.is_compiling()


def name() -> str:
    """``"native"`` or ``"reference"``."""
    return "reference" if native() is None else "native"
