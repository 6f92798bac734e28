"""Which kernels run on which tensors, and whether the native extension can be used.

The native extension ``quantine._native`` is C++ and reads tensors on the CPU only, so every kernel
asks `of` before it hands a tensor to it. NVIDIA's GPUs have programs in Triton, for the kernels
that have a package ``triton``. The environment variable ``QUANTINE_BACKEND`` may be ``auto`` (the
default: native where the extension is installed, Triton where it is), ``reference`` (neither) or
``native`` (an error where the extension is missing).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Final, Literal

import torch
from torch import Tensor

from quantine.errors import BackendUnavailable

Backend = Literal["native", "triton", "reference"]
"""``"native"``: C++ on the CPU. ``"triton"``: programs on a GPU of NVIDIA, for kernels that have
them. ``"reference"``: plain PyTorch, which runs on any device."""

CAPABILITY: Final = (8, 0)
"""Least compute capability of a GPU that programs in Triton are for (Ampere)."""

VARIABLE: Final = "QUANTINE_BACKEND"
"""Environment variable that chooses the backend."""
CHOICES: Final = ("auto", "native", "reference")
"""Values of that variable, the default first."""


def of(*tensors: Tensor | None) -> Backend:
    """The kernels that run on ``tensors``: native ones on the CPU, Triton's on NVIDIA's GPUs.

    Elsewhere, and where these are not installed, it is the reference.

    Args:
        tensors: all tensors of one call; ``None`` stands for one that is left out.

    Raises:
        BackendUnavailable: there are no tensors, or they are on several devices.
    """
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1:
        listed = ", ".join(sorted(map(str, devices))) or "no device"
        raise BackendUnavailable(f"a kernel got tensors on {listed}: move them to one device")
    device = devices.pop()
    if device.type == "cuda":
        return "triton" if _takes_triton(device) else "reference"
    return "native" if device.type == "cpu" and native() is not None else "reference"


@functools.cache
def _takes_triton(device: torch.device) -> bool:
    """Whether programs in Triton run on ``device``, one of CUDA's; a warning where they do not."""
    if os.environ.get(VARIABLE, "auto") == "reference":
        return False
    if torch.version.hip is not None:
        lacks = "it is not of NVIDIA"
    elif importlib.util.find_spec("triton") is None:
        lacks = "Triton is not installed"
    elif torch.cuda.get_device_capability(device) < CAPABILITY:
        lacks = f"its compute capability is below {CAPABILITY[0]}.{CAPABILITY[1]}"
    else:
        return True
    warnings.warn(
        f"quantine's programs do not run on {device} ({lacks}); the slower PyTorch reference is "
        "used",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def launching(tensor: Tensor) -> AbstractContextManager[None]:
    """Inside of this context programs in Triton run on the device of ``tensor``.

    Triton itself takes the current device, whichever that of the tensors is.
    """
    on_gpu = tensor.device.type == "cuda"
    return torch.cuda.device(tensor.device) if on_gpu else nullcontext()


def check_native(*tensors: Tensor | None) -> None:
    """Raise an error unless native kernels take ``tensors``.

    Raises:
        BackendUnavailable: the native extension is missing or turned off, or the tensors are not
            on the CPU.
    """
    if of(*tensors) != "native":
        found = next(tensor for tensor in tensors if tensor is not None)
        raise BackendUnavailable(
            f"no native kernel takes tensors on {found.device} here: use the modules' own forward"
        )


@functools.cache
def native() -> ModuleType | None:
    """The module ``quantine._native``, or ``None`` where the PyTorch reference is used instead.

    An extension that cannot be loaded is a warning, once in a process.

    Raises:
        BackendUnavailable: ``QUANTINE_BACKEND`` is ``native`` and the extension cannot be loaded,
            or it is none of `CHOICES`.
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
    """The module ``quantine._native``, for callers that have no other way to compute.

    Raises:
        BackendUnavailable: the extension is missing or turned off.
    """
    found = native()
    if found is None:
        raise BackendUnavailable("the native extension is not there, or turned off")
    return found


def is_recorded() -> bool:
    """Whether PyTorch is tracing or compiling the computation.

    A recording holds PyTorch's operations only: native kernels, and branches that depend on values,
    would be missing from it.
    """
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return tracing or torch.compiler.is_compiling()


def is_compiled() -> bool:
    """Whether PyTorch compiles the computation for this process.

    Such a recording may hold quantine's own operators; what is exported or traced may leave the
    process, and holds PyTorch's.
    """
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def name() -> Backend:
    """The backend of tensors on the CPU."""
    return "reference" if native() is None else "native"
