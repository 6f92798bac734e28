"""Rounding a head's channels one after another, each making up for the errors before it.

What GPTQ (arXiv 2210.17323) does with weights, for activations that meet vectors of a known second
moment: keys meet queries, queries meet keys, values meet the output projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.core.grid import decode, encode


def encode_fed(x: Tensor, scale: Tensor, zero: Tensor, feedback: Tensor, bits: int) -> Tensor:
    """Codes of ``x`` ``[..., heads, dim]`` float32, as whole float32 numbers of the same shape.

    Args:
        scale, zero: ``[heads, dim]`` float32.
        feedback: ``[heads, dim, dim]`` float32, see `quantine.rptq.feedback.feedback_of`.
        bits: of a code.
    """
    rest, codes = x.clone(), torch.empty_like(x)
    for channel in range(x.shape[-1]):
        own = scale[:, channel], zero[:, channel]
        codes[..., channel] = encode(rest[..., channel], *own, bits)
        error = rest[..., channel] - decode(codes[..., channel], *own)
        after = slice(channel + 1, None)
        rest[..., after] -= error.unsqueeze(-1) * feedback[:, channel, after]
    return codes
