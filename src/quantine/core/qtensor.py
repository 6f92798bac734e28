"""The quantized matrix that every solver returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.sparse import Csr


@dataclass(frozen=True)
class QTensor:
    """A quantized matrix; `dequantize` defines what formats and kernels must reproduce.

    Attributes:
        codes: ``[out, in]`` uint8, columns in stored order.
        grid: scales and zero points, over groups of stored columns or of rows.
        in_perm: ``[in]`` int64: stored column ``j`` belongs to input ``in_perm[j]``. ``None`` where
            columns are stored in input order.
        outliers: values that *replace* decoded codes, columns in stored order; ``None`` without
            outliers.
    """

    codes: Tensor
    grid: Grid
    in_perm: Tensor | None = None
    outliers: Csr | None = None

    def dequantize(self) -> Tensor:
        """Decode the matrix, outliers included: ``[out, in]`` float32, columns in input order."""
        stored = self.grid.decode(self.codes)
        if self.outliers is not None:
            self.outliers.replace_in(stored)
        if self.in_perm is None:
            return stored
        weight = torch.empty_like(stored)
        weight[:, self.in_perm] = stored
        return weight
