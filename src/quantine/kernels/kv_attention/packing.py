"""Rounding keys and values of attention to packed codes, as `PackedStates` holds them."""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.core.ambient import without_autocast
from quantine.core.grid import encode
from quantine.kernels import backend
from quantine.kernels.bits.reference import pack_reference, packed_bytes
from quantine.kernels.kv_attention import cpu
from quantine.kernels.kv_attention.feedback import encode_fed
from quantine.kernels.kv_attention.packed_states import PackedStates


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
    kind = backend.of(states, scale, zero, packed, feedback)
    if kind == "native":
        cpu.pack_states(states, bits, scale, zero, packed, feedback)
    elif kind == "triton":
        from quantine.kernels.kv_attention.triton import packing as programs

        programs.pack_states(states, bits, scale, zero, packed, feedback)
    else:
        packed.copy_(pack_states_reference(states, bits, scale, zero, feedback))


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
        with without_autocast(states.device):
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
