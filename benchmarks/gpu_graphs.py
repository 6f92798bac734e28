"""Microseconds of calls on a GPU, in CUDA graphs that go through more than its cache holds."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantine.runtime.graph_decoder import cuda_graph

ROOT = Path(__file__).parents[1]
ROTATED = 240_000_000
"""Bytes of matrices that a graph goes through: more than a GPU's cache."""
MOST_MATRICES = 64
"""Matrices of a graph."""
REPLAYS = 7
"""Replays of a graph, of which the median counts."""


def copies(make: Callable[[], Any]) -> list[Any]:
    """As many matrices of one kind as fill `ROTATED` bytes, two at least."""
    first = make()
    tensors = [first] if isinstance(first, Tensor) else first.parts()[0]
    nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    count = min(MOST_MATRICES, max(2, -(-ROTATED // nbytes)))
    return [first, *(make() for _ in range(count - 1))]


def replayed(calls: list[Callable[[], Any]]) -> float:
    """Microseconds of one of ``calls``, which run one after another in a CUDA graph."""

    def one_after_another() -> None:
        for call in calls:
            call()

    replay = cuda_graph(torch.device("cuda"), one_after_another)
    spent = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        spent.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(spent)


def on_device(value: Any) -> Any:
    """``value``, a matrix or a grid, with all its tensors on the GPU."""
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    from gpu_device import moved

    return moved(value, "cuda")
