"""Matrices of experts as GPUs read them: those that are alike lie one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from quantine.kernels.matrix.units.unit_matrix import UnitMatrix

ENTRIES: Final = (2, 3)
"""Which parts of a matrix are its outliers, see `UnitMatrix.parts`: as long as there are any."""


@dataclass(frozen=True)
class UnitStack:
    """Matrices of some experts: of one shape, equally packed.

    Attributes:
        matrices: the matrices, whose tensors are parts of the stacked ones.
        numbers: number of the expert of each.
        places: ``[experts]`` int32: where the matrix of each expert is among them, -1 if it is in
            another stack.
        starts: ``[matrices]`` int64: where the outliers of each begin; ``None`` without outliers.
        multipliers: ``[matrices]`` float32, that of each.
    """

    matrices: tuple[UnitMatrix, ...]
    numbers: tuple[int, ...]
    places: Tensor
    starts: Tensor | None
    multipliers: Tensor


def stacked(matrices: Sequence[UnitMatrix]) -> list[UnitStack]:
    """Stacks of the matrices of experts, which are on one device: one for each way of packing.

    Args:
        matrices: the matrix of each expert; their tensors are copied.
    """
    kinds: dict[Any, list[int]] = {}
    for number, matrix in enumerate(matrices):
        kinds.setdefault(_kind(matrix), []).append(number)
    return [_stack(matrices, numbers) for numbers in kinds.values()]


def _kind(matrix: UnitMatrix) -> Any:
    """What matrices of one stack have in common."""
    tensors, numbers, _ = matrix.parts()
    shapes = [
        (
            tensor is None,
            None if tensor is None or part in ENTRIES else (tensor.shape, tensor.dtype),
        )
        for part, tensor in enumerate(tensors)
    ]
    return tuple(numbers), tuple(shapes)


def _stack(matrices: Sequence[UnitMatrix], numbers: list[int]) -> UnitStack:
    chosen = [matrices[number] for number in numbers]
    device = chosen[0].words.device
    taken = [matrix.parts() for matrix in chosen]
    parts = zip(*(tensors for tensors, _, _ in taken), strict=True)
    views = zip(*(_joined(part, same) for part, same in enumerate(parts)), strict=True)
    found = tuple(
        UnitMatrix.of_parts(view, counted, multiplier)
        for view, (_, counted, multiplier) in zip(views, taken, strict=True)
    )
    places = torch.full((len(matrices),), -1, dtype=torch.int32, device="cpu")
    places[numbers] = torch.arange(len(numbers), dtype=torch.int32, device="cpu")
    starts = None
    if chosen[0].entries is not None:
        counts = [0 if m.entries is None else len(m.entries.words) for m in chosen]
        lengths = torch.tensor(counts, dtype=torch.int64, device="cpu")
        starts = (lengths.cumsum(0) - lengths).to(device)
    multipliers = [matrix.multiplier for matrix in chosen]
    return UnitStack(
        found,
        tuple(numbers),
        places.to(device),
        starts,
        torch.tensor(multipliers, dtype=torch.float32, device=device),
    )


def _joined(part: int, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Copies of ``tensors``, one after the other in memory."""
    there = [tensor for tensor in tensors if tensor is not None]
    if not there:
        return tensors
    if part in ENTRIES:
        return torch.cat(there).split_with_sizes([len(tensor) for tensor in there])
    return torch.stack(there).unbind()
