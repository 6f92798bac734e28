"""What a quantized matrix means."""

from __future__ import annotations

import torch

from quantine.core.grid import Grid
from quantine.core.qtensor import QTensor

CODES = torch.tensor([[0, 1, 2, 3], [3, 3, 0, 1]], dtype=torch.uint8)
GRID = Grid(
    torch.tensor([[1.0, 10.0], [0.5, 2.0]], dtype=torch.float16),
    torch.tensor([[0, 1], [2, 0]], dtype=torch.uint8),
    bits=2,
    group_size=2,
)


def test_dequantize_by_hand() -> None:
    expected = [[0.0, 1.0, 10.0, 20.0], [0.5, 0.5, 0.0, 2.0]]
    assert QTensor(CODES, GRID).dequantize().tolist() == expected


def test_stored_column_j_belongs_to_input_in_perm_j() -> None:
    # Groups run over stored columns; the permutation is undone last.
    weight = QTensor(CODES, GRID, torch.tensor([2, 0, 3, 1])).dequantize()
    assert weight.tolist() == [[1.0, 20.0, 0.0, 10.0], [0.5, 2.0, 0.5, 0.0]]
    assert weight.dtype == torch.float32


def test_dequantize_leaves_the_stored_values_alone() -> None:
    codes, scale = CODES.clone(), GRID.scale.clone()
    QTensor(CODES, GRID, torch.tensor([3, 2, 1, 0])).dequantize()
    assert torch.equal(CODES, codes)
    assert torch.equal(GRID.scale, scale)
