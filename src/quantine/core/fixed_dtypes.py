"""Buffers that keep their dtype when a model is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype of each element size in bytes, as which the bits of a float are moved between
devices."""


class FixedDtypes(nn.Module):
    """A module whose buffers named in `fixed_names` keep their dtype when the model is cast.

    ``model.to(torch.bfloat16)`` then changes activations, biases and norms, but never codes or
    scales. Moving the model to another device moves these buffers too.
    """

    fixed_names: tuple[str, ...] = ()
    """Names of the buffers that keep their dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        fixed = {name: self._buffers.pop(name) for name in self.fixed_names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in fixed.items():
            if tensor is None:
                self._buffers[name] = None
                continue
            # A cast leaves integers alone but a move does not, so a float is moved as an integer.
            word = WORDS.get(tensor.element_size()) if tensor.is_floating_point() else None
            bits = fn(tensor if word is None else tensor.view(word))
            self._buffers[name] = bits.view(tensor.dtype) if bits.dtype != tensor.dtype else bits
        return self
