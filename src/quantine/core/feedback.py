"""Rounding a head's channels one after another, each making up for the errors before it.

What GPTQ (arXiv 2210.17323) does with weights, for activations that meet vectors of a known second
moment: keys meet queries, queries meet keys, values meet the output projection.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.core.grid import decode, encode

DAMP: Final = 0.01
"""Share of the mean diagonal that is added to the diagonal of a second moment."""


def feedback_of(moments: Tensor) -> Tensor:
    """What an error of one channel is worth in the channels after it.

    Args:
        moments: ``[heads, dim, dim]`` float, second moments of what the channels are multiplied by.

    Returns:
        ``[heads, dim, dim]`` float16, zero on and below the diagonal.
    """
    moments = moments.double()
    mean = moments.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    unit = torch.eye(moments.shape[1], dtype=torch.float64)
    damped = moments / mean[:, None, None] + DAMP * unit
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    ratios = upper / upper.diagonal(dim1=1, dim2=2).unsqueeze(2)
    found: Tensor = ratios.triu(1).half().contiguous()
    return found


def encode_fed(x: Tensor, scale: Tensor, zero: Tensor, feedback: Tensor, bits: int) -> Tensor:
    """Codes of ``x`` ``[..., heads, dim]`` float32, as whole float32 numbers of the same shape.

    Args:
        scale, zero: ``[heads, dim]`` float32.
        feedback: ``[heads, dim, dim]`` float32, see `feedback_of`.
        bits: of a code.
    """
    rest, codes = x.clone(), torch.empty_like(x)
    for channel in range(x.shape[-1]):
        own = scale[:, channel], zero[:, channel]
        codes[..., channel] = encode(rest[..., channel].unsqueeze(-1), *own, bits).squeeze(-1)
        error = rest[..., channel] - decode(codes[..., channel].unsqueeze(-1), *own).squeeze(-1)
        after = slice(channel + 1, None)
        rest[..., after] -= error.unsqueeze(-1) * feedback[:, channel, after]
    return codes
