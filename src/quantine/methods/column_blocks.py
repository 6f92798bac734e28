"""What a column loop does around its kernels: blocks of columns, lazy updates, the result."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.permute import inverse
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.kernels.columns import round_block
from quantine.kernels.columns.columns import Columns


def blocks(count: int, length: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Cut columns into blocks of about ``block_size``, each of whole groups or within one group.

    So when a group is fitted, every update from the columns before it has been applied.

    Args:
        count: number of columns.
        length: number of columns per group.
        block_size: number of columns per block, at most; less if groups do not fill a block.

    Returns:
        Pairs of the first column of a block and the one after its last.
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


def round_columns(columns: Columns, length: int, block_size: int) -> None:
    """Round all columns, block after block.

    Args:
        columns: the matrix, of which no column is rounded yet.
        length: number of columns per group that is fitted in the loop; 1 where none is.
        block_size: number of columns per lazy update.

    Raises:
        SolverError: a scale or a zero point does not fit into float16.
    """
    for start, stop in blocks(len(columns.weights), length, block_size):
        round_block(columns, start, stop)
        feed_back(columns, start, stop)
    if columns.at_reach is not None:
        columns.at_reach.fitted.check()


def feed_back(columns: Columns, start: int, stop: int) -> None:
    """Correct the columns from ``stop`` on for the errors of those before, from ``start`` on."""
    columns.weights[stop:].addmm_(
        columns.upper[start:stop, stop:].T, columns.errors[start:stop], alpha=-1
    )


def result(columns: Columns, grid: Grid, order: Tensor | None, in_perm: Tensor | None) -> QTensor:
    """The quantized matrix after all ``columns`` are rounded.

    Args:
        columns: the rounded columns, in solving order.
        grid: the grid of the result, over its columns in stored order.
        order: ``[in]`` int64: stored column ``j`` is the solved column ``order[j]``. ``None``
            stores columns in solving order.
        in_perm: the order of inputs to store with the matrix, see `quantine.core.qtensor.QTensor`;
            ``None`` if columns are stored in input order.
    """
    codes = columns.codes if order is None else columns.codes[order]
    outliers = None
    if columns.kept is not None:
        places, rows = columns.kept.nonzero(as_tuple=True)
        values = columns.weights[places, rows]
        places = places if order is None else inverse(order)[places]
        inputs, out_features = columns.kept.shape
        outliers = Csr.of_entries(rows, places, values, (out_features, inputs))
    return QTensor(codes.T.contiguous(), grid, in_perm, outliers)
