"""Look up a PyTorch device by name, with an error that says what to do if it is missing."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.errors import BackendUnavailable

CPU: Final = torch.device("cpu")
"""The device that everything is on unless a caller asks for another one."""
AUTO: Final = "auto"
"""Stands for the fastest device here: a GPU that PyTorch calls ``cuda``, else the CPU."""


def device_named(name: str | torch.device) -> torch.device:
    """The device that PyTorch calls ``name``, such as ``cpu`` or ``cuda:1``; or that of `AUTO`.

    Raises:
        BackendUnavailable: this machine, or the installed PyTorch, has no such device.
    """
    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() else CPU
    try:
        device = torch.empty(0, dtype=torch.float32, device=torch.device(name)).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise BackendUnavailable(
            f"there is no device {str(name)!r} here ({reason}): use cpu, or install a PyTorch that "
            "knows the device"
        ) from error
    if device.type == "meta":
        raise BackendUnavailable("device 'meta' holds no values to compute with: use cpu")
    return device


def has_float64(device: torch.device) -> bool:
    """Whether ``device`` computes in float64: Apple's GPUs and some of Intel's do not."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_capability(device).get("has_fp64", True))
    return device.type != "mps"


def for_float64(values: Tensor) -> Tensor:
    """``values`` where they can be computed with in float64: as they are, or else on the CPU."""
    return values if has_float64(values.device) else values.to(CPU)
