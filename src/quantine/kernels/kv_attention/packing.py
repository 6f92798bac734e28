"""Keys and values of attention into packed codes, as `PackedStates` holds them."""

from __future__ import annotations

import torch
from torch import Tensor

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
    """Write the codes of ``states`` ``[batch, heads, tokens, dim]``, of any float dtype.

    Args:
        bits, scale, zero: as `PackedStates` takes them.
        packed: ``[batch, heads, tokens, packed_bytes]`` uint8, which is written.
        feedback: ``[heads, dim, dim]`` float16, see `quantine.kernels.kv_attention.feedback`.
    """
    if backend.of(states, scale, zero, packed, feedback) == "native":
        cpu.pack_states(states, bits, scale, zero, packed, feedback)
    else:
        packed.copy_(pack_states_reference(states, bits, scale, zero, feedback))


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
