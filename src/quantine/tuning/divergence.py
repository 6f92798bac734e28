"""How far the predictions of one model are from those of another, and the gradient of that."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

NUMBERS_AT_ONCE: Final = 2**18
"""Number of logits whose probabilities are in float32 at once: as many as fit a cache."""


@torch.no_grad()
def divergence(
    reference: Tensor, logits: Tensor, gradient: Tensor | None = None, share: float = 1.0
) -> float:
    """The Kullback-Leibler divergence from ``reference``, summed over positions, in nats.

    Args:
        reference: the reference's logits, ``[positions, vocabulary]`` of any float dtype.
        logits: the logits that are judged, of the same shape.
        gradient: is filled with ``share`` of the divergence's gradient in ``logits``, which is the
            model's probabilities less the reference's; of the same shape, of any float dtype.
        share: see ``gradient``.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    rows_at_once = max(1, NUMBERS_AT_ONCE // logits.shape[1])
    for start in range(0, len(logits), rows_at_once):
        rows = slice(start, start + rows_at_once)
        expected = reference[rows].float().log_softmax(-1)
        found = logits[rows].float().log_softmax(-1)
        chance = expected.exp()
        total += expected.sub_(found).mul_(chance).sum(dtype=torch.float64)
        if gradient is not None:
            gradient[rows] = found.exp_().sub_(chance).mul_(share)
    return float(total)
