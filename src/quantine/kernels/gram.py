"""Sums of ``x x.T`` over tokens: the native kernel, else the meaning in `quantine.core.observe`.

Both sum exact products of bfloat16 in float32 and differ only in how those sums round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.core import observe
from quantine.kernels import backend
from quantine.kernels.threads import pool


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add ``x.T @ x`` to ``total``; native for bfloat16 where the processor multiplies its tiles.

    Args:
        total: ``[in, in]`` float32, symmetric.
        x: ``[tokens, in]`` float.
    """
    native = backend.native()
    if native is None or x.dtype != torch.bfloat16 or not native.multiplies_tiles():
        observe.add_gram(total, x)
        return
    native.add_gram(x.contiguous().view(torch.int16), total, pool())
