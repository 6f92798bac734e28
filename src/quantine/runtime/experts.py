"""Packed experts of one block, of which the chosen ones are multiplied together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantine.core.ambient import without_autocast
from quantine.core.overrides import is_overridden
from quantine.families.experts import DOWN, Experts, rows_of
from quantine.kernels import backend
from quantine.kernels.matrix import grouped_product
from quantine.runtime.modules import QuantLinear
from quantine.runtime.packed import takes_kernels


class PackedExperts(Experts):
    """The experts of one block of a loaded model.

    On the CPU, the products of all chosen experts with their tokens are one call of the native
    extension, and so are those with what is activated. Each expert is called by itself elsewhere,
    and where a chosen one has matrices that are not packed, round their inputs, differ in how they
    are multiplied or have something put onto them. What is computed is the same.
    """

    def run(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """See `quantine.families.experts.Experts.run`."""
        chosen: list[Any] = [expert for expert, count in zip(self, counts, strict=True) if count]
        counted = [count for count in counts if count]
        if not (chosen and _is_native(x) and _are_alike(chosen, x.dtype)):
            return super().run(x, counts)
        found = _products(chosen, chosen[0].inputs, x, counted)
        inner = None if found is None else chosen[0].activated(*found)
        outputs = None if inner is None else _products(chosen, (DOWN,), inner, counted)
        return super().run(x, counts) if outputs is None else outputs[0]


def _is_native(x: Tensor) -> bool:
    """Whether the native extension can multiply ``x``."""
    return takes_kernels(x) and backend.of(x) == "native"


def _are_alike(experts: Sequence[Any], dtype: torch.dtype) -> bool:
    """Whether all matrices of ``experts`` are packed, and multiplied in one and the same way."""
    matrices = [one.get_submodule(name) for one in experts for name in (*one.inputs, DOWN)]
    return (
        all(map(_is_plain, matrices))
        and not any(map(is_overridden, (*experts, *matrices)))
        and len({matrix.arithmetic for matrix in matrices}) == 1
        and (dtype != torch.float16 or all("exponent" not in m.tensor_names for m in matrices))
    )


def _is_plain(module: nn.Module) -> bool:
    return type(module) is QuantLinear and module.inputs is None


def _products(
    experts: Sequence[Any], names: Sequence[str], x: Tensor, counts: Sequence[int]
) -> list[Tensor] | None:
    """Outputs ``[rows, out]`` of the matrices ``names`` of experts, each for rows of its own.

    Returns:
        One for each name; ``None`` where the extension cannot read a matrix.
    """
    modules: Any = [[one.get_submodule(name) for name in names] for one in experts]
    matrices = [[module.matrix(x.device) for module in some] for some in modules]
    if any(matrix is None for some in matrices for matrix in some):
        return None
    with without_autocast(x.device):
        found = grouped_product(matrices, x, counts, modules[0][0].arithmetic)
    for some, rows in zip(modules, rows_of(counts), strict=True):
        for module, result in zip(some, found, strict=True):
            if module.bias is not None:
                result[rows] += module.bias.to(x.dtype)
    return found
