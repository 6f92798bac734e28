"""How far the predictions of one model are from those of another, and the gradient of that."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

ROWS_AT_ONCE: Final = 256
"""Number of positions whose probabilities are in float32 at once, which bounds memory."""


def divergence(reference: Tensor, logits: Tensor) -> tuple[float, Tensor]:
    """The Kullback-Leibler divergence from ``reference``, summed, and its gradient in ``logits``.

    Args:
        reference: the reference's logits, ``[positions, vocabulary]`` of any float dtype.
        logits: the logits that are judged, of the same shape.

    Returns:
        The sum over positions in nats, and the gradient of that sum in the dtype of ``logits``: the
        model's probabilities less the reference's.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    gradient = torch.empty_like(logits)
    for start in range(0, len(logits), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        expected = reference[rows].float().log_softmax(-1)
        found = logits[rows].float().log_softmax(-1)
        share = expected.exp()
        total += (share * (expected - found)).sum(dtype=torch.float64)
        gradient[rows] = (found.exp_() - share).to(logits.dtype)
    return float(total), gradient
