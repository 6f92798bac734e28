"""GPTQ's column loop (arXiv 2210.17323, section 3), one block of columns at a time.

Matrices are transposed here, ``[inputs, rows]``, so that the weights of one input, a column of the
weight ``[rows, inputs]``, are contiguous. Native and reference differ only in how float32 sums and
multiply-subtracts round.
"""

from __future__ import annotations

from quantine.kernels import backend
from quantine.kernels.columns import cpu
from quantine.kernels.columns.columns import Columns
from quantine.kernels.columns.reference import round_block_reference


def round_block(columns: Columns, start: int, stop: int) -> None:
    """Round the columns from ``start`` to ``stop`` (exclusive), in place.

    The error of each column is fed back to the columns after it, but only up to ``stop``: those
    behind the block are the caller's, see `quantine.methods.column_blocks.feed_back`.

    Args:
        columns: the matrix; its codes, errors and outliers of these columns are filled in. Errors
            of all columns before ``start`` have been fed back.
        start: first column of the block. Where groups are fitted in the loop, every group that
            begins in the block begins at ``start`` or lies within the block.
        stop: first column after the block.

    Raises:
        SolverError: a scale or a zero point does not fit into float16. A GPU only notes it, for
            `quantine.kernels.fit.fitted.FittedGroups.check`.
    """
    kind = backend.of(*columns.tensors, columns.coupling)
    if kind == "native":
        cpu.round_block(columns, start, stop)
    elif kind == "triton":
        from quantine.kernels.columns.triton import columns as programs

        programs.round_block(columns, start, stop)
    else:
        round_block_reference(columns, start, stop)
