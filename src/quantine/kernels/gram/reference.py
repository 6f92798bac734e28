"""The meaning of `quantine.kernels.gram.add_gram`, in plain PyTorch."""

from __future__ import annotations

from typing import Final

from torch import Tensor

PANEL: Final = 256
"""Number of columns of the symmetric product that are computed at once."""


def add_gram_reference(total: Tensor, x: Tensor) -> None:
    """See `quantine.kernels.gram.add_gram`; ``x`` is turned into float32 first."""
    rows = x.float()
    # The product is symmetric: only panels on and right of the diagonal are multiplied.
    for start in range(0, rows.shape[1], PANEL):
        stop = start + PANEL
        product = rows[:, start:stop].T @ rows[:, start:]
        total[start:stop, start:] += product
        total[stop:, start:stop] += product[:, PANEL:].T
