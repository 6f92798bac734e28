"""Which kernels run on which tensors, and whether the native extension is there.

Every kernel asks `of` before it hands a tensor to anything but PyTorch: the device of a tensor
decides. ``QUANTINE_BACKEND=reference`` turns the native extension off; ``native`` insists on it.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import Final, Literal

import torch
from torch import Tensor

from quantine.errors import BackendUnavailable

Backend = Literal["native", "reference"]
"""``"native"``: C++ on the CPU. ``"reference"``: plain PyTorch, which runs on any device."""

VARIABLE: Final = "QUANTINE_BACKEND"
CHOICES: Final = ("auto", "native", "reference")


def of(*tensors: Tensor | None) -> Backend:
    """The kernels that run on ``tensors``, which their device decides; ``None`` does not count.

    Raises:
        BackendUnavailable: tensors are on several devices.
    """
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1:
        listed = ", ".join(sorted(map(str, devices))) or "no device"
        raise BackendUnavailable(f"a kernel got tensors on {listed}: move them to one device")
    on_cpu = devices.pop().type == "cpu"
    return "native" if on_cpu and native() is not None else "reference"


def check_native(*tensors: Tensor | None) -> None:
    """Refuse ``tensors`` that native kernels cannot take.

    Raises:
        BackendUnavailable: the native extension is not there, or they are not on the CPU.
    """
    if of(*tensors) != "native":
        found = next(tensor for tensor in tensors if tensor is not None)
        raise BackendUnavailable(
            f"no native kernel takes tensors on {found.device} here: use the modules' own forward"
        )


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


def extension() -> ModuleType:
    """The native extension, for what has already been decided to be native.

    Raises:
        BackendUnavailable: it is not there.
    """
    found = native()
    if found is None:
        raise BackendUnavailable("the native extension is not there, or turned off")
    return found


def is_recorded() -> bool:
    """Whether PyTorch records the computation: kernels, and choices by values, would be lost."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return tracing or torch.compiler.is_compiling()


def name() -> Backend:
    """The kernels that tensors on the CPU get."""
    return "reference" if native() is None else "native"
