"""What column loops do around the kernels: grids of rows, blocks of columns, feedback, results."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.permute import inverse
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.kernels.columns.columns import Columns


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
