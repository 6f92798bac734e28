"""The meaning of `quantine.kernels.gram.add_gram`, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

PANEL: Final = 256
"""Number of columns of the symmetric product that are computed at once."""


def add_gram_reference(total: Tensor, x: Tensor) -> None:
    """See `quantine.kernels.gram.add_gram`; ``x`` is turned into float32 first."""
    add_by_panels(total, x.float(), torch.mm)


def add_by_panels(
    total: Tensor, rows: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Add ``rows.T @ rows`` to ``total``, of whose two halves one is multiplied.

    Args:
        total: ``[in, in]`` float32, symmetric.
        rows: ``[tokens, in]``.
        multiply: the product of two matrices, in float32.
    """
    # Only panels on and right of the diagonal are multiplied.
    for start in range(0, rows.shape[1], PANEL):
        stop = start + PANEL
        product = multiply(rows[:, start:stop].T, rows[:, start:])
        total[start:stop, start:] += product
        total[stop:, start:stop] += product[:, PANEL:].T
