"""PyTorch's devices: by name, and what decides how they compute."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import torch
from torch import Tensor

from quantine.errors import BackendUnavailable, cut

CPU: Final = torch.device("cpu")
"""The device that everything is on unless a caller asks for another one."""
AUTO: Final = "auto"
"""Stands for the fastest device here: a GPU that PyTorch calls ``cuda``, else the CPU."""
ASSERTING: Final = ("cpu", "cuda")
"""Devices where PyTorch asserts without the host."""


def device_named(name: str | torch.device) -> torch.device:
    """The device that PyTorch calls ``name``, such as ``cpu`` or ``cuda:1``; or that of `AUTO`.

    Raises:
        BackendUnavailable: this machine, or the installed PyTorch, has no such device.
    """
    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() and torch.version.hip is None else CPU
    try:
        device = torch.empty(0, dtype=torch.float32, device=torch.device(name)).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = cut(str(error).partition("\n")[0], 80)
        raise BackendUnavailable(
            f"there is no device {str(name)!r} here ({reason}): use cpu, or install a PyTorch that "
            "knows the device"
        ) from error
    if device.type == "meta":
        raise BackendUnavailable("device 'meta' holds no values to compute with: use cpu")
    return device


def device_to_plan(name: str | torch.device) -> torch.device:
    """The device that PyTorch calls ``name``, which need not be there; or that of `AUTO`.

    Raises:
        BackendUnavailable: PyTorch knows no such device, or it holds no values.
    """
    if name == AUTO:
        return device_named(name)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BackendUnavailable(
            f"PyTorch knows no device {str(name)!r}: use cpu, cuda, mps or xpu"
        ) from error
    return device_named(device) if device.type in {CPU.type, "meta"} else device


def is_here(device: torch.device) -> bool:
    """Whether this machine has ``device``."""
    try:
        device_named(device)
    except BackendUnavailable:
        return False
    return True


def device_facts(device: torch.device) -> dict[str, str]:
    """What decides how ``device`` sums floats, PyTorch's version apart, by what it describes."""
    if device.type == CPU.type:
        return {"device": str(device)}
    module: Any = torch.get_device_module(device)
    named = getattr(module, "get_device_name", None)
    facts = {"device": str(device)} if named is None else {"device": named(device)}
    if device.type == "cuda":
        facts["CUDA version"] = str(torch.version.cuda or torch.version.hip)
        try:
            facts["triton version"] = version("triton")
        except PackageNotFoundError:
            facts["triton version"] = "none"
    return facts


def described(device: torch.device) -> str:
    """Name of ``device`` for users: PyTorch's, and that of its maker where it has one."""
    name = device_facts(device)["device"]
    return name if name == str(device) else f"{device} ({name})"


def for_float64(tensor: Tensor) -> Tensor:
    """``tensor`` where float64 can be computed: on its device, or on the CPU if that has none.

    What needs float64 is computed in it whatever the device, never in float32 instead: some devices
    (``mps``) have no float64.
    """
    return tensor if has_float64(tensor.device) else tensor.cpu()


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether ``device`` computes in float64, found by trying it."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device).add_(1)
    except (RuntimeError, TypeError):
        return False
    return True


def assert_there(fits: Tensor, said: str) -> None:
    """Assert ``fits``, one boolean, on its device, without waiting for it where PyTorch can.

    Raises:
        RuntimeError: ``fits`` is false. It says ``said`` wherever it was not raised by a GPU.
    """
    if fits.device.type in ASSERTING:
        torch._assert_async(fits, said)
    elif not bool(fits):
        raise RuntimeError(said)
