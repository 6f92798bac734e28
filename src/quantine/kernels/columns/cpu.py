"""`quantine.kernels.columns` by the native extension: tensors are on the CPU and contiguous."""

from __future__ import annotations

import torch

from quantine.kernels import backend
from quantine.kernels.columns.columns import Columns
from quantine.kernels.fit.cpu import fitter
from quantine.kernels.fit.misfit import raise_misfit
from quantine.kernels.threads import pool


def round_block(columns: Columns, start: int, stop: int) -> None:
    """See `quantine.kernels.columns.round_block`."""
    found = columns.at_reach
    misfit = backend.extension().round_block(
        columns.weights,
        columns.upper,
        columns.groups,
        columns.scales,
        columns.zeros,
        columns.codes,
        columns.errors,
        None if columns.kept is None else columns.kept.view(torch.uint8),
        columns.bits,
        columns.price,
        columns.coupling,
        start,
        stop,
        found and fitter(found.fitted, found.spread, found.cost),
        pool(),
    )
    raise_misfit(misfit)
