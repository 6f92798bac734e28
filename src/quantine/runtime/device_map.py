"""Device maps of transformers and accelerate: which module is on which device."""

from __future__ import annotations

from typing import Any, Final

from torch import nn

from quantine.core.device import CPU

NO_DEVICES: Final = frozenset({"cpu", "disk"})
"""What accelerate takes for places to keep weights, not for devices that compute."""


def computes_on_cpu(device_map: dict[str, Any]) -> dict[str, Any]:
    """``device_map`` with which modules on the CPU compute there, beside others on a GPU.

    accelerate sends the weights of modules on ``"cpu"`` to the GPU whenever they are used, and
    buffers, such as packed tensors, for good. What is on a device, which PyTorch's own CPU is, it
    leaves there, and sends activations.
    """
    if set(device_map.values()) <= NO_DEVICES:
        return dict(device_map)
    return {name: CPU if place == "cpu" else place for name, place in device_map.items()}


def is_loaded_per_call(module: nn.Module) -> bool:
    """Whether accelerate reads the tensors of ``module`` for a call, and drops them after it."""
    hook = getattr(module, "_hf_hook", None)
    return bool(getattr(hook, "offload", False) and getattr(hook, "offload_buffers", False))
