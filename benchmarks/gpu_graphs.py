"""Microseconds of calls on a GPU, in CUDA graphs that go through more than its cache holds."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantine.eval.device_speed import copy_speed, graph_seconds
from quantine.runtime.graph_decoder import cuda_graph

ROOT = Path(__file__).parents[1]
ROTATED = 240_000_000
"""Bytes of matrices that a graph goes through: more than a GPU's cache."""
MOST_MATRICES = 64
"""Matrices of a graph."""
REPLAYS = 7
"""Replays of a graph, of which the median counts."""


class Gpu:
    """A GPU that PyTorch knows, as what is timed is given it; tests give another.

    Attributes:
        device: its name.
        bandwidth: bytes a second of its memory, found by copying.
    """

    device = "cuda"

    def __init__(self) -> None:
        whole = torch.device("cuda", torch.cuda.current_device())
        speed = copy_speed(whole, lambda work: graph_seconds(whole, work))
        self.bandwidth = speed * 1e9

    def record(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """``step`` as a CUDA graph."""
        return cuda_graph(torch.device("cuda"), step)

    def microseconds(self, replay: Callable[[], Any]) -> float:
        """Microseconds from the beginning to the end of ``replay`` on the GPU."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) * 1e3


def replayed(gpu: Gpu, calls: list[Callable[[], Any]]) -> float:
    """Microseconds of one of ``calls``, which run one after another in a CUDA graph."""

    def one_after_another() -> None:
        for call in calls:
            call()

    replay = gpu.record(one_after_another)
    return statistics.median(gpu.microseconds(replay) for _ in range(REPLAYS)) / len(calls)


def copies(first: Any) -> list[Any]:
    """``first`` and as many copies of it as fill `ROTATED` bytes together, two in all at least.

    Args:
        first: a tensor, or a matrix that gives its parts.
    """
    count = min(MOST_MATRICES, max(2, -(-ROTATED // bytes_of(first))))
    return [first, *(_copied(first) for _ in range(count - 1))]


def bytes_of(value: Any) -> int:
    """Bytes of a tensor, or of all parts of a matrix."""
    tensors = [value] if isinstance(value, Tensor) else value.parts()[0]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    tensors, *rest = value.parts()
    cloned = [None if tensor is None else tensor.clone() for tensor in tensors]
    return type(value).of_parts(cloned, *rest)


def moved(value: Any, device: str) -> Any:
    """``value``, a matrix or a grid, with all its tensors on ``device``."""
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    from gpu_device import moved as moved_to

    return moved_to(value, device)


def speeds(gpu: Gpu, spent: float, floats: float, nbytes: int) -> dict[str, Any]:
    """What is said of ``spent`` microseconds in which ``nbytes`` are read; floats take ``floats``.

    The share of the bandwidth is in percent.
    """
    return {
        "microseconds": round(spent, 2),
        "float16_microseconds": round(floats, 2),
        "times_float16": round(floats / spent, 2),
        "gigabytes_per_second": round(nbytes / spent / 1e3, 1),
        "share_of_bandwidth": round(100 * nbytes / spent * 1e6 / gpu.bandwidth, 1),
    }
