"""The column loop of the solvers, one block of columns at a time.

Matrices are transposed, ``[inputs, rows]``, so that a column of the weight is contiguous. Native
and reference differ only in how float32 sums and multiply-subtracts round.
"""

from __future__ import annotations

from quantine.kernels import backend
from quantine.kernels.columns import cpu
from quantine.kernels.columns.columns import Columns
from quantine.kernels.columns.reference import round_block_reference


def round_block(columns: Columns, start: int, stop: int) -> None:
    """Round columns one by one, feeding each one's error to those behind it up to ``stop``.

    A group that is fitted starts at ``start``, or is whole between the two; its columns have
    received every error before ``start``.

    Raises:
        SolverError: a scale does not fit into float16.
    """
    if backend.of(columns.weights, columns.upper) == "native":
        cpu.round_block(columns, start, stop)
    else:
        round_block_reference(columns, start, stop)
