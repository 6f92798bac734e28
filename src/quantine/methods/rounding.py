"""What column loops do around the kernels: grids of rows, blocks of columns, feedback, results."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.objective import Objective
from quantine.core.permute import inverse
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.core.spec import QuantSpec
from quantine.kernels.columns import Columns
from quantine.kernels.fit import fit_groups


def blocks(count: int, length: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Cut ``count`` columns into blocks of about ``block_size``: whole groups, or part of one.

    A group of ``length`` columns is thus fitted when every update before it is applied.
    """
    if length <= block_size:
        width = block_size // length * length
        yield from ((start, min(start + width, count)) for start in range(0, count, width))
        return
    for group in range(0, count, length):
        end = min(group + length, count)
        yield from (
            (start, min(start + block_size, end)) for start in range(group, end, block_size)
        )


def fit_rows(weight: Tensor, spread: Tensor, spec: QuantSpec, objective: Objective) -> Grid:
    """The grid of groups of consecutive inputs, all of one size or clusters.

    Args:
        weight: ``[out, in]`` float32.
        spread: ``[in]`` float32, see `quantine.core.objective`.

    Raises:
        SolverError: a scale does not fit into float16.
    """
    if not spec.clustered:
        length = spec.group_length(weight.shape[1])
        groups = weight.T.unflatten(0, (-1, length))
        return fit_groups(groups, spread.unflatten(0, (-1, length)), spec, objective)
    sizes = spec.cluster_sizes
    fitted = [
        fit_groups(columns.unsqueeze(0), own.unsqueeze(0), spec, objective)
        for columns, own in zip(weight.T.split(sizes), spread.split(sizes), strict=True)
    ]
    zeros = [grid.zero_point for grid in fitted if isinstance(grid.zero_point, Tensor)]
    zero = torch.cat(zeros, 1) if zeros else None
    scale = torch.cat([grid.scale for grid in fitted if isinstance(grid.scale, Tensor)], 1)
    return Grid(scale, zero, spec.bits, spec.group_size, sizes=sizes)


def feed_back(columns: Columns, start: int, stop: int) -> None:
    """Take the errors of the columns from ``start`` to ``stop`` off those behind."""
    columns.weights[stop:].addmm_(
        columns.upper[start:stop, stop:].T, columns.errors[start:stop], alpha=-1
    )


def result(columns: Columns, grid: Grid, order: Tensor | None, in_perm: Tensor | None) -> QTensor:
    """The rounded ``columns``, column ``order[j]`` as number ``j``."""
    codes = columns.codes if order is None else columns.codes[order]
    outliers = None
    if columns.kept is not None:
        places, rows = columns.kept.nonzero(as_tuple=True)
        values = columns.weights[places, rows]
        places = places if order is None else inverse(order)[places]
        inputs, out_features = columns.kept.shape
        outliers = Csr.of_entries(rows, places, values, (out_features, inputs))
    return QTensor(codes.T.contiguous(), grid, in_perm, outliers)
