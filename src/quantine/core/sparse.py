"""Sparse matrices that hold outliers: the weights that are kept in 16 bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Csr:
    """A sparse matrix in compressed rows (CSR); column indices ascend within a row.

    Attributes:
        row_offsets: ``[rows + 1]`` int64: the entries of row ``r`` are numbers ``row_offsets[r]``
            to ``row_offsets[r + 1] - 1``.
        columns: ``[entries]`` int64, the column of each entry.
        values: ``[entries]`` float16, as solvers give them. Float32 where the grid of the codes has
            an exponent, which the stored values then have, too; and where a layout stores outliers
            as float16 differences from the decoded codes: their sums need more digits.
        shape: ``(rows, columns)`` of the matrix.
    """

    row_offsets: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]

    @classmethod
    def where(cls, mask: Tensor, values: Tensor) -> Csr:
        """The entries of ``values`` ``[rows, columns]`` float where the bool ``mask`` is true."""
        rows, columns = mask.nonzero(as_tuple=True)
        return cls.of_entries(rows, columns, values[mask], (mask.shape[0], mask.shape[1]))

    @classmethod
    def of_entries(
        cls, rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]
    ) -> Csr:
        """A sparse matrix from its entries in any order; values are rounded to float16.

        Args:
            rows, columns: place of each entry, ``[entries]`` int64, no place twice.
            values: ``[entries]`` float.
            shape: ``(rows, columns)`` of the matrix.
        """
        order = (rows * shape[1] + columns).argsort()
        offsets = rows.new_zeros(shape[0] + 1)
        torch.cumsum(rows.bincount(minlength=shape[0]), 0, out=offsets[1:])
        return cls(offsets, columns[order], values[order].half(), shape)

    @property
    def entries(self) -> int:
        """Number of stored entries."""
        return len(self.values)

    def row_indices(self) -> Tensor:
        """The row of every entry, ``[entries]`` int64."""
        numbers = torch.arange(self.shape[0], device=self.row_offsets.device)
        return torch.repeat_interleave(numbers, self.row_offsets.diff())

    def rows(self, chosen: Tensor) -> Csr:
        """The sparse matrix of the rows at the int64 indices ``chosen``, in that order."""
        counts = self.row_offsets.diff()[chosen]
        offsets = counts.new_zeros(len(chosen) + 1)
        torch.cumsum(counts, 0, out=offsets[1:])
        start = torch.repeat_interleave(self.row_offsets[chosen] - offsets[:-1], counts)
        picked = start + torch.arange(len(start), device=start.device)
        shape = (len(chosen), self.shape[1])
        return Csr(offsets, self.columns[picked], self.values[picked], shape)

    def replace_in(self, dense: Tensor) -> None:
        """Overwrite the places of the entries in ``dense`` ``[rows, columns]`` float32."""
        dense[self.row_indices(), self.columns] = self.values.to(dense.dtype)
