"""The pool of threads that native kernels share."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from quantine.kernels import backend


def pool() -> Any:
    """The process's ``quantine._native.Pool`` of as many threads as PyTorch uses at this moment.

    Raises:
        BackendUnavailable: the native extension is missing or turned off.
    """
    return _pool(torch.get_num_threads(), os.getpid())


@functools.lru_cache(maxsize=2)
def _pool(threads: int, process: int) -> Any:
    # By process, because threads do not survive a fork. Who goes back and forth between two numbers
    # of threads keeps both pools; more would sleep for good.
    return backend.extension().Pool(threads)
