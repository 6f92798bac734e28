"""The speed of a GPU's memory, and of products there, beside which launches take no time.

On NVIDIA's GPUs a CUDA graph holds all launches of a measurement. Other devices launch one by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch

from quantine.kernels.matrix import product
from quantine.runtime.graph_decoder import cuda_graph
from quantine.runtime.packed import Packed

CACHED: Final = 240_000_000
"""Bytes of matrices that a measurement goes through, so that no GPU's cache holds them."""
MOST: Final = 256
"""Matrices that a measurement goes through beside the model's own, however small they are."""
COPIED: Final = 2**29
"""Bytes that are copied to measure the speed of memory."""

Timer = Callable[[Callable[[], Any]], float]
"""Seconds that some work takes on a device."""


def copy_speed(device: torch.device, timer: Timer) -> float:
    """Speed of the memory of ``device`` in GB/s: bytes copied, each read and written."""
    source = torch.zeros(COPIED // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer(lambda: target.copy_(source)) / 1e9


def product_speed(modules: list[Packed], device: torch.device, timer: Timer) -> float:
    """Speed of products with one row of activations, in GB/s of a matrix as the device holds it.

    The matrices of ``modules`` are multiplied in turn, those that a cache would hold several times
    over, in places of their own.

    Args:
        modules: packed modules of one kind, which have a matrix on ``device``.
    """
    held = [module.matrix(device) for module in modules]
    nbytes = device_bytes(held[0])
    missing = min(MOST, max(0, -(-CACHED // nbytes) - len(held)))
    matrices = held + [_copied(held[n % len(held)]) for n in range(missing)]
    x = torch.ones(1, modules[0].in_features, dtype=torch.float16, device=device)

    def multiply_all() -> None:
        for matrix in matrices:
            product(matrix, x, "exact")

    return len(matrices) * nbytes / timer(multiply_all) / 1e9


def device_bytes(matrix: Any) -> int:
    """Bytes of a `quantine.kernels.matrix.units.unit_matrix.UnitMatrix`."""
    return sum(part.nbytes for part in matrix.parts()[0] if part is not None)


def _copied(matrix: Any) -> Any:
    tensors, numbers, multiplier = matrix.parts()
    copies = [None if part is None else part.clone() for part in tensors]
    return type(matrix).of_parts(copies, numbers, multiplier)


def timer_of(device: torch.device) -> Timer:
    """The way to time work on ``device``."""
    return partial(graph_seconds, device) if device.type == "cuda" else launched_seconds(device)


def graph_seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds of ``work`` on the GPU ``device``, recorded as one CUDA graph."""
    replay = cuda_graph(device, work)
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        replay()
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def launched_seconds(device: torch.device) -> Timer:
    """Times work on ``device`` by the clock; what is asked for last must be there then."""
    module = getattr(torch, device.type, None)
    wait: Callable[[], Any] = getattr(module, "synchronize", lambda: None)

    def seconds(work: Callable[[], Any]) -> float:
        work()
        wait()
        started = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - started

    return seconds
