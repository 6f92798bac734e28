"""The threads of the native kernels."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from quantine.kernels import backend


def pool() -> Any:
    """Threads for native kernels, as many as PyTorch uses."""
    return _pool(torch.get_num_threads(), os.getpid())


@functools.cache
def _pool(threads: int, process: int) -> Any:
    # By process, because threads do not survive a fork.
    return backend.extension().Pool(threads)
