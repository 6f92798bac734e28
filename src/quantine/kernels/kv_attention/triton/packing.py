"""Rounding keys and values to packed codes on a GPU, as an operator of PyTorch.

Importing this module registers the operator ``quantine::pack_states``.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
from torch import Tensor

from quantine.kernels.kv_attention.triton.pieces import pieces_of, width_of
from quantine.kernels.kv_attention.triton.programs.rounding import round_to_codes

TOKENS: Final = 4
"""Most tokens of a program, which is one warp."""


@torch.library.custom_op("quantine::pack_states", mutates_args=("packed",))
def pack_states(
    states: Tensor,
    bits: int,
    scale: Tensor,
    zero: Tensor,
    packed: Tensor,
    feedback: Tensor | None,
) -> None:
    """See `quantine.kernels.kv_attention.packing.pack_states`, whose reference it is bit by bit.

    One launch rounds all channels of all heads; the channels of a head follow one another in
    registers where errors are fed back.
    """
    batch, heads, tokens, dim = states.shape
    if states.numel() == 0:
        return
    pieces, most = pieces_of(bits), min(TOKENS, triton.next_power_of_2(tokens))
    round_to_codes[(triton.cdiv(tokens, most), heads, batch)](
        states,
        scale.contiguous(),
        zero.contiguous(),
        None if feedback is None else feedback.contiguous(),
        packed,
        tokens,
        *states.stride(),
        *packed.stride()[:3],
        BITS=bits,
        DIM=dim,
        WIDTH=width_of(dim),
        TOKENS=most,
        WORDS=pieces.words,
        CODES=pieces.codes,
        num_warps=1,
        enable_fp_fusion=False,  # as the reference, which rounds products before it subtracts them
    )


@pack_states.register_fake
def _(
    states: Tensor,
    bits: int,
    scale: Tensor,
    zero: Tensor,
    packed: Tensor,
    feedback: Tensor | None,
) -> None:
    return None
