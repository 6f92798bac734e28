"""Keys and values of attention as packed codes, in tensors that behave like floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from quantine.core.grid import decode, encode
from quantine.kernels import backend
from quantine.kernels.bits import unpack
from quantine.kernels.bits.reference import pack_reference, packed_bytes
from quantine.kernels.kv_attention.feedback import encode_fed
from quantine.kernels.threads import pool


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

    def decoded(self) -> Tensor:
        """The floats that the codes stand for, ``[batch, heads, tokens, dim]`` of this dtype."""
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
        """Call PyTorch's ``func`` with decoded floats in place of packed states."""
        args, kwargs = tree_map_only(cls, cls.decoded, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def pack_states(
    states: Tensor,
    bits: int,
    scale: Tensor,
    zero: Tensor,
    packed: Tensor,
    feedback: Tensor | None = None,
) -> None:
    """Round keys or values and write their codes into ``packed``.

    Args:
        states: ``[batch, heads, tokens, dim]`` of any float dtype.
        bits, scale, zero: the grid, as for `PackedStates`.
        packed: ``[batch, heads, tokens, bytes]`` uint8, overwritten.
        feedback: ``[heads, dim, dim]`` float16, for error feedback among channels, see
            `quantine.kernels.kv_attention.feedback`; ``None`` rounds to nearest.
    """
    if backend.of(states, scale, packed) == "reference":
        packed.copy_(pack_states_reference(states, bits, scale, zero, feedback))
        return
    floats = states.detach().float()
    floats = floats if floats.stride(3) == 1 else floats.contiguous()
    halves = None if feedback is None else feedback.contiguous().view(torch.int16)
    backend.extension().pack_states(floats, scale, zero, halves, bits, packed, pool())


def pack_states_reference(
    states: Tensor, bits: int, scale: Tensor, zero: Tensor, feedback: Tensor | None = None
) -> Tensor:
    """The bytes that `pack_states` writes, in plain PyTorch; arguments are the same.

    Returns:
        ``[batch, heads, tokens, bytes]`` uint8.
    """
    floats = states.detach().float()
    if feedback is None:
        codes = encode(floats, scale.unsqueeze(1), zero.unsqueeze(1), bits)
    else:
        tokens_first = floats.transpose(1, 2)
        codes = encode_fed(tokens_first, scale, zero, feedback.float(), bits).transpose(1, 2)
    rows = codes.byte().reshape(-1, states.shape[3])
    return pack_reference(rows, bits).view(*states.shape[:3], packed_bytes(states.shape[3], bits))


@torch.library.custom_op("quantine::round_states", mutates_args=())
def round_states(
    states: Tensor, bits: int, scale: Tensor, zero: Tensor, feedback: Tensor
) -> Tensor:
    """Round keys, values or queries with error feedback, and decode the codes again.

    Args:
        states, bits, scale, zero, feedback: as for `pack_states`.

    Returns:
        ``[batch, heads, tokens, dim]`` float32.
    """
    shape = (*states.shape[:3], packed_bytes(states.shape[3], bits))
    packed = torch.empty(shape, dtype=torch.uint8, device=states.device)
    pack_states(states, bits, scale, zero, packed, feedback)
    return PackedStates(packed, bits, scale, zero, torch.float32).decoded()


@round_states.register_fake
def _(states: Tensor, bits: int, scale: Tensor, zero: Tensor, feedback: Tensor) -> Tensor:
    return states.new_empty(states.shape, dtype=torch.float32)
