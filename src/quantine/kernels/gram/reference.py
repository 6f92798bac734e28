"""The meaning of `quantine.kernels.gram.add_gram_reference`, in plain PyTorch."""

from __future__ import annotations

from typing import Final

from torch import Tensor

PANEL: Final = 256
"""Columns of a symmetric product that are multiplied at once."""


def add_gram_reference(total: Tensor, x: Tensor) -> None:
    """What `add_gram` does.

    Args:
        total: ``[in, in]`` float32, symmetric.
        x: ``[tokens, in]`` float; products are of float32.
    """
    rows = x.float()
    # The product is symmetric: only panels on and right of the diagonal are multiplied.
    for start in range(0, rows.shape[1], PANEL):
        stop = start + PANEL
        product = rows[:, start:stop].T @ rows[:, start:]
        total[start:stop, start:] += product
        total[stop:, start:stop] += product[:, PANEL:].T
