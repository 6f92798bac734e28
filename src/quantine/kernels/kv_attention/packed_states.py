"""Keys and values of attention as packed codes that pass for floats."""

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


def pack_states(
    states: Tensor,
    bits: int,
    scale: Tensor,
    zero: Tensor,
    packed: Tensor,
    feedback: Tensor | None = None,
) -> None:
    """Write the codes of ``states`` ``[batch, heads, tokens, dim]``, of any float dtype.

    Args:
        bits, scale, zero: as `PackedStates` takes them.
        packed: ``[batch, heads, tokens, packed_bytes]`` uint8, which is written.
        feedback: ``[heads, dim, dim]`` float16, see `quantine.kernels.kv_attention.feedback`.
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
    """What `pack_states` writes."""
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
    """What the codes of ``states`` ``[batch, heads, tokens, dim]`` stand for, as float32.

    Arguments are those of `pack_states`.
    """
    shape = (*states.shape[:3], packed_bytes(states.shape[3], bits))
    packed = torch.empty(shape, dtype=torch.uint8, device=states.device)
    pack_states(states, bits, scale, zero, packed, feedback)
    return PackedStates(packed, bits, scale, zero, torch.float32).decoded()


@round_states.register_fake
def _(states: Tensor, bits: int, scale: Tensor, zero: Tensor, feedback: Tensor) -> Tensor:
    return states.new_empty(states.shape, dtype=torch.float32)
