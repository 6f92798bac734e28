"""Keys and values of attention as packed codes that pass for floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from quantine.core.grid import decode
from quantine.kernels.bits import unpack


class PackedStates(Tensor):
    """Packed keys or values with the shape and dtype of what they stand for.

    Whoever knows them reads their codes. Any operation of PyTorch meets decoded floats, so any
    attention function can be handed them.

    Args:
        packed: ``[batch, heads, tokens, bytes]`` uint8, each row one bit stream of codes.
        bits: of a code, 2 to 8.
        scale, zero: ``[heads, dim]`` float32: a code ``c`` stands for ``scale * (c - zero)``.
        dtype: of decoded floats.
    """

    packed: Tensor
    bits: int
    scale: Tensor
    zero: Tensor

    @staticmethod
    def __new__(
        cls, packed: Tensor, bits: int, scale: Tensor, zero: Tensor, dtype: torch.dtype
    ) -> PackedStates:
        """An empty tensor; `__init__` says what it stands for."""
        shape = (*packed.shape[:3], scale.shape[1])
        made: PackedStates = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=packed.device
        )
        return made

    def __init__(
        self, packed: Tensor, bits: int, scale: Tensor, zero: Tensor, dtype: torch.dtype
    ) -> None:
        self.packed, self.bits, self.scale, self.zero = packed, bits, scale, zero

    def decoded(self) -> Tensor:
        """``[batch, heads, tokens, dim]`` floats."""
        batch, heads, tokens, dim = self.shape
        rows = self.packed.reshape(batch * heads * tokens, self.packed.shape[3])
        codes = unpack(rows, self.bits, dim).view(batch, heads, tokens, dim)
        states = decode(codes, self.scale.unsqueeze(1), self.zero.unsqueeze(1))
        return states.to(self.dtype)

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
        """``func`` of decoded floats."""
        args, kwargs = tree_map_only(cls, cls.decoded, (args, dict(kwargs or {})))
        return func(*args, **kwargs)
