"""Error feedback among the channels of an attention head, as GPTQ has it among weights.

The channels of a head are rounded one after another, and the channels still to come make up for the
errors so far (GPTQ, arXiv 2210.17323). The Hessian is the second moment of the vectors that the
channels are multiplied with: queries for keys, keys for queries, rows of the output projection for
values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.core.grid import decode, encode_up_to


def encode_fed(x: Tensor, scale: Tensor, zero: Tensor, feedback: Tensor, tops: Tensor) -> Tensor:
    """Codes of queries, keys or values, rounded with error feedback.

    Args:
        x: ``[..., heads, dim]`` float32.
        scale, zero: ``[heads, dim]`` float32.
        feedback: ``[heads, dim, dim]`` float32: in row ``i`` what an error of channel ``i``
            subtracts from each later one, see `quantine.rptq.feedback.feedback_of`.
        tops: ``[heads, dim]`` float32, the largest code of each channel.

    Returns:
        Whole numbers from 0 to ``tops``, float32 in the shape of ``x``.
    """
    rest, codes = x.clone(), torch.empty_like(x)
    for channel in range(x.shape[-1]):
        own = scale[:, channel], zero[:, channel]
        codes[..., channel] = encode_up_to(rest[..., channel], *own, tops[:, channel])
        error = rest[..., channel] - decode(codes[..., channel], *own)
        after = slice(channel + 1, None)
        rest[..., after] -= error.unsqueeze(-1) * feedback[:, channel, after]
    return codes
