"""The matrix for error feedback among the channels of an attention head."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.core.device import for_float64

DAMP: Final = 0.01
"""Damping, as GPTQ has it for Hessians: the share of the mean diagonal that is added to it."""


def feedback_of(moments: Tensor) -> Tensor:
    """What an error of one channel subtracts from each channel rounded after it.

    The rows of the inverse second moment's upper Cholesky factor, divided by its diagonal (GPTQ,
    arXiv 2210.17323, section 3.3).

    Args:
        moments: ``[heads, dim, dim]`` of any float dtype, second moments of the vectors that the
            channels are multiplied with.

    Returns:
        ``[heads, dim, dim]`` float16: in row ``i`` the factors on the error of channel ``i``, one
        for each later channel; zero on and below the diagonal.
    """
    device, moments = moments.device, for_float64(moments).double()
    mean = moments.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    unit = torch.eye(moments.shape[1], dtype=torch.float64, device=moments.device)
    damped = moments / mean[:, None, None] + DAMP * unit
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    ratios = upper / upper.diagonal(dim1=1, dim2=2).unsqueeze(2)
    found: Tensor = ratios.triu(1).half().contiguous().to(device)
    return found
