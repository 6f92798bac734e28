"""Sums of ``x x.T`` over tokens.

Native and reference sum exact products of bfloat16 in float32 and differ only in how those sums
round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.gram import cpu
from quantine.kernels.gram.reference import add_gram_reference


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add ``x.T @ x`` to ``total``; native for bfloat16 where the processor multiplies its tiles.

    Args:
        total: ``[in, in]`` float32, symmetric.
        x: ``[tokens, in]`` float.
    """
    if backend.of(total, x) == "native" and x.dtype == torch.bfloat16 and cpu.multiplies_tiles():
        cpu.add_gram(total, x)
    else:
        add_gram_reference(total, x)
