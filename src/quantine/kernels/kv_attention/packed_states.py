"""Keys and values of attention as packed codes, in tensors that behave like floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from quantine.core.grid import decode
from quantine.kernels.bits import unpack


class PackedStates(Tensor):
    """Packed keys or values, with the shape and dtype of the floats they stand for.

    quantine's attention reads the codes. Any operation of PyTorch gets the decoded floats instead,
    so other attention functions work with them as well.

    Args:
        packed: ``[batch, heads, tokens, bytes]`` uint8: the codes of one head and token in a row,
            in the layout of `quantine.kernels.bits.reference`.
        bits: number of bits of one code, 2 to 8.
        scale, zero: ``[heads, dim]`` float32: a code ``c`` stands for ``scale * (c - zero)``.
        dtype: float dtype that the tensor shows and decodes to.
    """

    packed: Tensor
    bits: int
    scale: Tensor
    zero: Tensor

    @staticmethod
    def __new__(
        cls, packed: Tensor, bits: int, scale: Tensor, zero: Tensor, dtype: torch.dtype
    ) -> PackedStates:
        """A tensor ``[batch, heads, tokens, dim]`` without memory; `__init__` adds the codes."""
        shape = (*packed.shape[:3], scale.shape[1])
        made: PackedStates = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=packed.device
        )
        return made

    def __init__(
        self, packed: Tensor, bits: int, scale: Tensor, zero: Tensor, dtype: torch.dtype
    ) -> None:
        self.packed, self.bits, self.scale, self.zero = packed, bits, scale, zero

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors inside: packed codes, scales, zero points."""
        return self.packed, self.scale, self.zero

    def decoded(self) -> Tensor:
        """The floats that the codes stand for, ``[batch, heads, tokens, dim]`` of this dtype."""
        return _decoded(self)

    # Functions of PyTorch keep their results as they are: floats.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call PyTorch's ``func`` with decoded floats in place of packed states."""
        args, kwargs = tree_map_only(cls, cls.decoded, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


@dataclass(frozen=True)
class RecordedStates:
    """What stands for `PackedStates` while PyTorch compiles, which cannot make such a tensor.

    Only quantine's attention reads it. Attributes are those of `PackedStates`.
    """

    packed: Tensor
    bits: int
    scale: Tensor
    zero: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """``[batch, heads, tokens, dim]``."""
        return torch.Size((*self.packed.shape[:3], self.scale.shape[1]))

    def decoded(self) -> Tensor:
        """The floats that the codes stand for, ``[batch, heads, tokens, dim]`` of this dtype."""
        return _decoded(self)


def _decoded(states: PackedStates | RecordedStates) -> Tensor:
    batch, heads, tokens, dim = states.shape
    rows = states.packed.reshape(batch * heads * tokens, states.packed.shape[3])
    codes = unpack(rows, states.bits, dim).view(batch, heads, tokens, dim)
    floats = decode(codes, states.scale.unsqueeze(1), states.zero.unsqueeze(1))
    return floats.to(states.dtype)
