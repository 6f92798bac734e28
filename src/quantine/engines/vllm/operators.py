"""Operators of PyTorch for layers of packed matrices: compilers and graphs see each as one node.

Operators take tensors and plain values only. So a layer is handed over by its number, in a tensor
on the CPU: the graphs of all blocks of a model are then the same one. `numbered` keeps the numbers;
it keeps no layer alive.

Importing this module registers ``quantine::engine_linear`` and ``quantine::engine_embedding``.
"""

from __future__ import annotations

from itertools import count
from typing import Any, Final
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_LAYERS: Final[WeakValueDictionary[int, Any]] = WeakValueDictionary()
_NUMBERS: Final = count()


def numbered(layer: Any) -> Tensor:
    """Give ``layer``, a callable, a number with which operators find it.

    Returns:
        ``[1]`` int64 on the CPU. It means something in this process only, as long as ``layer``
        lives.
    """
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return torch.tensor([number], dtype=torch.int64, device="cpu")


def linear(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    """Map ``x`` ``[rows, in]`` by the layer ``number`` to ``[rows, out]`` of the same dtype."""
    found: Tensor = torch.ops.quantine.engine_linear(x, number, out_features)
    return found


def embedding(tokens: Tensor, number: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Look up ``tokens`` ``[...]`` int64 in the table ``number``: ``[..., width]`` of ``dtype``."""
    found: Tensor = torch.ops.quantine.engine_embedding(tokens, number, width, dtype)
    return found


@torch.library.custom_op("quantine::engine_linear", mutates_args=())
def _linear(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    found: Tensor = _LAYERS[int(number)](x)
    assert found.shape[1] == out_features
    return found


@_linear.register_fake
def _linear_shape(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


@torch.library.custom_op("quantine::engine_embedding", mutates_args=())
def _embedding(tokens: Tensor, number: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    found: Tensor = _LAYERS[int(number)](tokens)
    assert found.shape[-1] == width
    assert found.dtype == dtype
    return found


@_embedding.register_fake
def _embedding_shape(tokens: Tensor, number: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return tokens.new_empty((*tokens.shape, width), dtype=dtype)
