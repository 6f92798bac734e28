"""Channels of keys with different numbers of bits."""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.kernels.kv_attention.digits import DIGIT


def uneven_widths(heads: int, dim: int, bits: int, seed: int) -> Tensor:
    """Even numbers of bits, ``bits * dim`` for each head together at most."""
    generator = torch.Generator().manual_seed(seed)
    widths = torch.zeros(heads, dim, dtype=torch.uint8)
    for head in range(heads):
        for _ in range(bits * dim // DIGIT):
            channel = int(torch.randint(dim, (1,), generator=generator))
            widths[head, channel] = min(8, int(widths[head, channel]) + DIGIT)
    return widths
