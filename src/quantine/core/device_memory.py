"""Memory of a device that is not the CPU: what is free, its peak, and a bound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from quantine.core.device import CPU, is_here


def free_memory(device: torch.device) -> int | None:
    """Bytes that tensors of this process may still take on ``device``.

    Returns:
        ``None`` for the CPU, for a device that is not here, and where PyTorch cannot tell.
    """
    if device.type == CPU.type or not is_here(device):
        return None
    module: Any = torch.get_device_module(device)
    recommended = getattr(module, "recommended_max_memory", None)  # of mps
    if recommended is not None:
        return int(recommended() - module.driver_allocated_memory())
    asked = getattr(module, "mem_get_info", None)
    if asked is None:
        return None
    # What PyTorch has taken and freed is reused.
    reusable = module.memory_reserved(device) - module.memory_allocated(device)
    return int(asked(device)[0] + reusable)


def peak_device_memory(device: torch.device) -> int | None:
    """Most bytes of tensors on ``device`` since `forget_peak_device_memory`; ``None``: unknown."""
    asked = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return None if device.type == CPU.type or asked is None else int(asked(device))


def forget_peak_device_memory(device: torch.device) -> None:
    """Let `peak_device_memory` start again from what is used now."""
    reset = getattr(torch.get_device_module(device), "reset_peak_memory_stats", None)
    if device.type != CPU.type and reset is not None:
        reset(device)


@contextmanager
def bounded(device: torch.device, most: int | None) -> Iterator[None]:
    """A context in which PyTorch takes ``most`` more bytes on ``device``, where it can be told.

    Only for CUDA, and beside the bytes of tensors that the caller has there already. Memory that
    was freed, but is not given back, is given back before the bound is an error.
    """
    if device.type != "cuda" or most is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    before = torch.cuda.get_per_process_memory_fraction(device)
    most += torch.cuda.memory_allocated(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
