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
    start: Tensor | None = None,
) -> None:
    """Round keys or values and write their codes into ``packed``.

    On GPUs, in compiled graphs and where ``start`` says the place, it is an operator of PyTorch,
    ``quantine::pack_states``, which chooses kernels when it runs.

    Args:
        states: ``[batch, heads, tokens, dim]`` of any float dtype.
        bits, scale, zero: the grid, as for `PackedStates`.
        packed: ``[batch, heads, tokens, bytes]`` uint8, overwritten.
        feedback: ``[heads, dim, dim]`` float16, for error feedback among channels, see
            `quantine.kernels.kv_attention.feedback`; ``None`` rounds to nearest.
        start: ``[]`` int64 on the device of ``packed``, which then has room for more tokens: those
            from place ``start`` on are overwritten. The host does not read it on a GPU, where
            tokens without room are not written: `quantine.runtime.kv_cache` lets the device
            check that there are none.

    Raises:
        ValueError: ``packed`` has no room from ``start`` on, on other devices than GPUs of NVIDIA.
    """
    operands = states, bits, scale, zero, packed, feedback, start
    if start is None and not backend.is_compiled():
        kind = backend.of(states, scale, zero, packed, feedback)
        if kind != "triton":
            _chosen(*operands)
            return
    _pack_states(*operands)


def _chosen(
    states: Tensor,
    bits: int,
    scale: Tensor,
    zero: Tensor,
    packed: Tensor,
    feedback: Tensor | None,
    start: Tensor | None,
) -> None:
    kind = backend.of(states, scale, zero, packed, feedback, start)
    if kind == "triton":
        from quantine.kernels.kv_attention.triton import packing as programs

        programs.pack_states(states, bits, scale, zero, packed, feedback, start)
        return
    if start is not None:
        packed = _part(packed, int(start), states.shape[2])
    if kind == "native":
        cpu.pack_states(states, bits, scale, zero, packed, feedback)
    else:
        packed.copy_(pack_states_reference(states, bits, scale, zero, feedback))


def _part(packed: Tensor, start: int, tokens: int) -> Tensor:
    """So many tokens of ``packed`` ``[batch, heads, room, bytes]`` from place ``start`` on.

    Raises:
        ValueError: there is no room for them.
    """
    room = packed.shape[2]
    if not 0 <= start <= room - tokens:
        raise ValueError(f"{tokens} tokens after {start}, in a cache with room for {room}")
    return packed[:, :, start : start + tokens]


_pack_states = torch.library.custom_op("quantine::pack_states", _chosen, mutates_args=("packed",))


@_pack_states.register_fake
def _(
    states: Tensor,
    bits: int,
    scale: Tensor,
    zero: Tensor,
    packed: Tensor,
    feedback: Tensor | None,
    start: Tensor | None,
) -> None:
    return None


@torch.library.custom_op("quantine::put_rows", mutates_args=("packed",))
def put_rows(rows: Tensor, packed: Tensor, start: Tensor) -> None:
    """Write rows of codes into a cache from a place on that the host need not read.

    Args:
        rows: ``[batch, heads, tokens, bytes]`` uint8.
        packed: ``[batch, heads, room, bytes]`` uint8, overwritten from place ``start`` on.
        start: ``[]`` int64 on the device of ``packed``.

    Raises:
        ValueError: there is no room, on other devices than GPUs of NVIDIA.
    """
    if packed.is_cuda:
        places = start + torch.arange(rows.shape[2], device=packed.device)
        packed.index_copy_(2, places, rows)
    else:
        _part(packed, int(start), rows.shape[2]).copy_(rows)


@put_rows.register_fake
def _(rows: Tensor, packed: Tensor, start: Tensor) -> None:
    return None


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
            tops = torch.full_like(scale, 2**bits - 1)
            codes = encode_fed(tokens_first, scale, zero, feedback.float(), tops).transpose(1, 2)
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
