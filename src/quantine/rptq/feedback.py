"""How much an error of one channel of a head is worth in the channels rounded after it."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

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
    unit = torch.eye(moments.shape[1], dtype=torch.float64, device=moments.device)
    damped = moments / mean[:, None, None] + DAMP * unit
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    ratios = upper / upper.diagonal(dim1=1, dim2=2).unsqueeze(2)
    found: Tensor = ratios.triu(1).half().contiguous()
    return found
