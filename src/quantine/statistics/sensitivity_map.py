"""How much each weight matters, as a map small enough to keep (SpQR, arXiv 2306.03078, section 3).

The sensitivity of a weight is the loss of the layer's output if only this weight is rounded and all
others make up for it: ``s = (w - quant(w))**2 / (2 * inverse(H)[j, j])``. With ``H`` the mean of
``x x.T`` over tokens, its unit is half a squared output per token, so maps of different layers can
be compared.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.core.device import for_float64
from quantine.core.qtensor import QTensor

MAP_CELLS: Final = 128
"""Largest number of cells of a map along an axis."""


def sensitivity_map(weight: Tensor, qtensor: QTensor, inverse_diagonal: Tensor) -> Tensor:
    """The mean sensitivity of the weights in each cell of a coarse map.

    ``quant(w)`` is the value nearest to ``w`` on the grid of ``qtensor``, also where ``qtensor``
    keeps an outlier: how far outliers are from the grid is why they are kept.

    Args:
        weight: ``[out, in]`` float32, columns in input order.
        qtensor: the quantized ``weight``.
        inverse_diagonal: ``[in]`` float32, see
            `quantine.statistics.hessian.Hessian.inverse_diagonal`.

    Returns:
        ``log10`` of the mean, ``[min(out, 128), min(in, 128)]`` float16: rows are outputs, columns
        inputs, assigned to cells by `cell_of`. Negative infinity where every weight of a cell is
        exactly on the grid or reads an input that was never active.
    """
    order = qtensor.in_perm
    stored = weight if order is None else weight[:, order]
    scores = qtensor.grid.decode(qtensor.grid.encode(stored)).sub_(stored).square_()
    del stored
    scores.div_(2 * (inverse_diagonal if order is None else inverse_diagonal[order]))
    columns = None if order is None else cell_of(weight.shape[1], device=order.device)[order]
    return pool_mean(scores, columns).log10().half()


def cell_of(length: int, cells: int = MAP_CELLS, device: torch.device | str = "cpu") -> Tensor:
    """The number of the cell of each position on an axis, ``[length]`` int64, ascending.

    There are ``min(length, cells)`` cells, whose sizes differ by at most one.
    """
    return torch.arange(length, device=device) * min(length, cells) // length


def pool_mean(values: Tensor, columns: Tensor | None = None, cells: int = MAP_CELLS) -> Tensor:
    """The mean of ``values`` in each cell of a map.

    Args:
        values: ``[rows, columns]`` float.
        columns: the cell of each column, ``[columns]`` int64; ``None`` where columns are in order.
        cells: largest number of cells along an axis.

    Returns:
        ``[min(rows, cells), min(columns, cells)]`` float64, where
        `quantine.core.device.for_float64` puts it.
    """
    values = for_float64(values)
    rows, width = values.shape
    device = values.device
    row_cells = cell_of(rows, cells, device)
    column_cells = cell_of(width, cells, device) if columns is None else columns.to(device)
    row_counts, column_counts = row_cells.bincount(), column_cells.bincount()
    bands = values.new_zeros(len(row_counts), width).index_add_(0, row_cells, values)
    bands = for_float64(bands).double()
    sums = bands.new_zeros(len(row_counts), len(column_counts))
    sums.index_add_(1, column_cells.to(sums.device), bands)
    return sums.div_(row_counts.unsqueeze(1).to(sums.device)).div_(column_counts.to(sums.device))
