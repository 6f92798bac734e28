"""Packed matrices, rows of packed tables and packed experts as operators of PyTorch.

A compiled graph holds operators on tensors and numbers. So it holds ``quantine::multiply_packed``,
``quantine::look_up_packed`` and ``quantine::run_experts``, and in them the number of a module,
which computes when the graph runs: by whichever kernels its device has, with the packed tensors
that it has then.
"""

from __future__ import annotations

import itertools
from typing import Any, Final, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from quantine.kernels import backend


class Multiplies(Protocol):
    """A module that holds a packed matrix."""

    def product(self, x: Tensor) -> Tensor:
        """``x @ W.T``."""
        ...

    def rounded_product(self, x: Tensor) -> Tensor:
        """``x @ W.T`` with ``x`` rounded as the module rounds its inputs."""
        ...


# Operators of PyTorch take tensors and numbers only. A module's tensors would not do: the matrix
# that kernels read is an object of the native extension, or is made anew on another device, and
# inputs of a graph lose what Python has attached to them. An operator for each module would be in
# PyTorch's own table, which forgets nothing. So the process has one table, as PyTorch has of its
# operators. It decides nothing: no number is used twice, and an entry goes with its module.
_LISTED: Final[WeakValueDictionary[int, Any]] = WeakValueDictionary()
"""Modules of this process by number, as long as they live."""
_NUMBERS: Final = itertools.count()


def listed(module: nn.Module) -> int:
    """A number that no other module of this process has or had."""
    number = next(_NUMBERS)
    _LISTED[number] = module
    return number


@torch.library.custom_op("quantine::multiply_packed", mutates_args=())
def multiply_packed(x: Tensor, number: int, outputs: int, rounds: bool) -> Tensor:
    """``x @ W.T`` with the matrix ``W`` of the module of a number.

    Args:
        x: ``[batch, in]`` of a float dtype.
        number: what `listed` returned.
        outputs: number of rows of ``W``.
        rounds: whether the module rounds ``x`` first.

    Returns:
        ``[batch, outputs]`` in the dtype of ``x``.
    """
    module: Multiplies = _LISTED[number]
    return module.rounded_product(x) if rounds else module.product(x)


@multiply_packed.register_fake
def _shape(x: Tensor, number: int, outputs: int, rounds: bool) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


@torch.library.custom_op("quantine::look_up_packed", mutates_args=())
def look_up(tokens: Tensor, number: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of the table of the module of a number, not scaled.

    Args:
        tokens: ``[n]`` int64.
        number: what `listed` returned for a `quantine.runtime.modules.QuantEmbedding`.
        width: of a row.
        dtype: of the result.

    Returns:
        ``[n, width]``.
    """
    module = _LISTED[number]
    rows: Tensor = module.rows(tokens, dtype)
    return rows


@look_up.register_fake
def _rows(tokens: Tensor, number: int, width: int, dtype: torch.dtype) -> Tensor:
    return tokens.new_empty(tokens.shape[0], width, dtype=dtype)


@torch.library.custom_op("quantine::run_experts", mutates_args=())
def run_experts(x: Tensor, index: Tensor, weights: Tensor, number: int) -> Tensor:
    """The sum of the outputs of each token's experts.

    Args:
        x: ``[tokens, width]`` of a float dtype.
        index, weights: ``[tokens, k]``, the numbers of each token's experts and the factors of
            their outputs.
        number: what `listed` returned for a `quantine.runtime.experts.PackedExperts`.

    Returns:
        ``[tokens, width]`` in the dtype of ``x``.
    """
    module = _LISTED[number]
    result: Tensor = module.mixed(x, index, weights)
    return result


@run_experts.register_fake
def _mixed(x: Tensor, index: Tensor, weights: Tensor, number: int) -> Tensor:
    return x.new_empty(x.shape)


def is_compiled(x: Tensor) -> bool:
    """Whether a product with ``x`` is recorded for this process, and without its gradient.

    What is exported or traced leaves the process, and holds PyTorch's own operators instead.
    """
    return backend.is_compiled() and not (torch.is_grad_enabled() and x.requires_grad)
