"""Matrices of all experts of a block in a GPU's memory, of which its programs take the chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantine.core.ambient import without_autocast
from quantine.families.expert_layout import DOWN
from quantine.kernels.matrix import experts_product
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix
from quantine.kernels.matrix.units.unit_stack import UnitStack, stacked
from quantine.runtime.snapshot import Snapshot


@dataclass(frozen=True)
class StackedExperts:
    """The matrices of all experts.

    Attributes:
        device: where they are.
        stacks: by name of the matrix inside of an expert.
        biases: ``[experts, out]`` likewise, of those that have some.
        made_from: the tensors of the experts.
    """

    device: torch.device
    stacks: Mapping[str, Sequence[UnitStack]]
    biases: Mapping[str, Tensor]
    made_from: Snapshot

    def is_of(self, experts: Sequence[Any], device: torch.device) -> bool:
        """Whether these are still the matrices of ``experts``, and on ``device``."""
        return self.device == device and self.made_from.holds(_tensors(experts))

    def product(self, name: str, x: Tensor, numbers: Tensor, ordered: bool) -> Tensor:
        """Outputs ``[rows, out]`` of matrices of one name, in the dtype of ``x``.

        Args:
            name: of the matrix inside of an expert.
            x: ``[rows, in]``.
            numbers: ``[rows]`` int64, that of the expert of each row.
            ordered: as for `quantine.kernels.matrix.experts_product`.
        """
        with without_autocast(x.device):
            found = experts_product(self.stacks[name], x, numbers, ordered)
        bias = self.biases.get(name)
        return found if bias is None else found + bias.index_select(0, numbers).to(x.dtype)


def stacked_experts(experts: Sequence[Any], device: torch.device) -> StackedExperts | None:
    """The matrices of ``experts`` on ``device``, or ``None`` where programs cannot read one.

    Each matrix is in memory once: that of a module is a part of these.

    Args:
        experts: all experts of a block, whose matrices are packed.
        device: a GPU of NVIDIA.
    """
    stacks, biases = {}, {}
    for name in _names(experts):
        modules = [expert.get_submodule(name) for expert in experts]
        matrices = [module.matrix(device) for module in modules]
        if not all(isinstance(matrix, UnitMatrix) for matrix in matrices):
            return None
        stacks[name] = stacked(matrices)
        for stack in stacks[name]:
            for number, matrix in zip(stack.numbers, stack.matrices, strict=True):
                modules[number].share(matrix)
        if modules[0].bias is not None:
            biases[name] = torch.stack([module.bias.detach() for module in modules])
    return StackedExperts(device, stacks, biases, Snapshot(_tensors(experts)))


def _names(experts: Sequence[Any]) -> tuple[str, ...]:
    return (*experts[0].inputs, DOWN)


def _tensors(experts: Sequence[Any]) -> Iterator[Tensor]:
    """All that the matrices are made of."""
    for expert in experts:
        for name in _names(experts):
            module = expert.get_submodule(name)
            yield from module.packed_tensors().values()
            if module.bias is not None:
                yield module.bias
