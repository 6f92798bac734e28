"""Rounding keys and values to packed codes on a GPU."""

from __future__ import annotations

from typing import Any, Final

import triton
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.kv_attention.triton.pieces import pieces_of, width_of
from quantine.kernels.kv_attention.triton.programs.rounding import round_to_codes

TOKENS: Final = 4
"""Most tokens of a program, which is one warp."""


def pack_states(
    states: Tensor,
    bits: int,
    scale: Tensor,
    zero: Tensor,
    packed: Tensor,
    feedback: Tensor | None = None,
    start: Tensor | None = None,
) -> None:
    """See `quantine.kernels.kv_attention.packing.pack_states`, whose reference it is bit by bit.

    One launch rounds all channels of all heads; the channels of a head follow one another in
    registers where errors are fed back.
    """
    if states.numel() == 0:
        return
    program, operands, settings = launch_of(states, bits, scale, zero, packed, feedback, start)
    batch, heads, tokens, _ = states.shape
    with backend.launching(states):
        program[(triton.cdiv(tokens, settings["TOKENS"]), heads, batch)](*operands, **settings)


def launch_of(
    states: Tensor,
    bits: int,
    scale: Tensor,
    zero: Tensor,
    packed: Tensor,
    feedback: Tensor | None,
    start: Tensor | None = None,
) -> tuple[Any, list[Any], dict[str, Any]]:
    """The program, its operands in order, and what is fixed when it is compiled."""
    tokens, dim = states.shape[2:]
    pieces = pieces_of(bits)
    operands = [
        states,
        scale.contiguous(),
        zero.contiguous(),
        None if feedback is None else feedback.contiguous(),
        packed,
        start,
        *(tokens, packed.shape[2]),
        *states.stride(),
        *packed.stride()[:3],
    ]
    settings = {
        "BITS": bits,
        "DIM": dim,
        "WIDTH": width_of(dim),
        "TOKENS": min(TOKENS, triton.next_power_of_2(tokens)),
        "WORDS": pieces.words,
        "CODES": pieces.codes,
        "num_warps": 1,
        # As the reference, which rounds products before it subtracts them.
        "enable_fp_fusion": False,
    }
    return round_to_codes, operands, settings
