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
        before = {name: self._buffers[name] for name in self.fixed_names}
        # What can fail, such as for want of memory, comes before anything is taken away.
        held = {name: None if b is None else _moved(fn, b) for name, b in before.items()}
        for name in before:
            del self._buffers[name]
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        except BaseException:
            held = before
            raise
        finally:
            self._buffers.update(held)
        return self


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What ``fn`` makes of ``tensor``, in the dtype of ``tensor``."""
    # A cast leaves integers alone but a move does not, so a float is moved as an integer.
    word = WORDS.get(tensor.element_size()) if tensor.is_floating_point() else None
    given = tensor if word is None else tensor.view(word)
    bits = fn(given)
    if bits is given:
        return tensor
    return bits.view(tensor.dtype) if bits.dtype != tensor.dtype else bits
