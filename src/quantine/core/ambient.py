"""Computing the same whatever state of PyTorch and NumPy the caller has set.

A default dtype, a default device, autocast, inference mode, the precision of products and the
treatment of floating point errors are settings of a process or thread. What quantine computes must
not depend on them: functions that others call set them, and put back what was there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Final

import numpy as np
import torch

from quantine.core.device import CPU

CASTING: Final = ("cpu", "cuda", "xpu", "mps")
"""Types of devices whose products autocast may round."""
EXACT: Final = "ieee"
"""PyTorch's name for products of float32 that are computed in float32."""
WORKSPACE: Final = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""Environment variable, and a value of it, with which cuBLAS sums in the same order every time."""
UNSET: Final = "none"
"""Its name for a precision that nobody has set, and so is `EXACT`."""


@contextmanager
def own_state() -> Iterator[None]:
    """A context, or with parentheses a decorator, in which the caller's state has no effect.

    Tensors made in it are float32, on the CPU and ordinary ones, unless their maker says otherwise;
    products are as precise as their dtype; nothing is recorded for gradients.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in CASTING:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device() != CPU:
            stack.enter_context(CPU)
        # NumPy's own defaults.
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        backends: Any = torch.backends  # whose types know no products of oneDNN
        for products in (backends.mkldnn.matmul, backends.cuda.matmul):
            precision = products.fp32_precision
            if precision not in {EXACT, UNSET}:
                stack.callback(setattr, products, "fp32_precision", precision)
                products.fp32_precision = EXACT
        yield


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """A context in which ``device`` sums floats in the same order every time.

    The results are then those of every run on such a device with such libraries. What PyTorch
    cannot compute so is an error there. The CPU needs nothing: its order depends on the number of
    threads alone.
    """
    if device.type == CPU.type:
        yield
        return
    with ExitStack() as stack:
        strict = torch.are_deterministic_algorithms_enabled()
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        stack.callback(torch.use_deterministic_algorithms, strict, warn_only=warns)
        torch.use_deterministic_algorithms(True)
        # Else PyTorch would fill every new tensor, though all are written before they are read.
        settings: list[tuple[Any, str, bool]] = [
            (torch.utils.deterministic, "fill_uninitialized_memory", False)
        ]
        if device.type == "cuda":
            products = torch.backends.cuda.matmul
            settings += [
                (torch.backends.cudnn, "benchmark", False),
                (products, "allow_bf16_reduced_precision_reduction", False),
                (products, "allow_fp16_reduced_precision_reduction", False),
            ]
            name, value = WORKSPACE
            if name not in os.environ:
                stack.callback(os.environ.pop, name, None)
                os.environ[name] = value
        for owner, key, wanted in settings:
            stack.callback(setattr, owner, key, getattr(owner, key))
            setattr(owner, key, wanted)
        yield


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which autocast does not round products on devices of the type of ``device``.

    Packed modules are like functions that PyTorch's autocast does not list: they compute in the
    dtype of their inputs.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
