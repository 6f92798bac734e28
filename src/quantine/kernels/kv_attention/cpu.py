"""`quantine.kernels.kv_attention` by the native extension: tensors are on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.kv_attention.digits import DIGIT
from quantine.kernels.kv_attention.packed_states import PackedStates
from quantine.kernels.kv_attention.scoring import Scoring
from quantine.kernels.threads import pool


def attend(
    query: Tensor, key: PackedStates, value: PackedStates, mask: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """See `quantine.kernels.kv_attention.attend`; has no gradients and no dropout.

    Probabilities are always returned. Where keys have a centre, scores have no bound.
    """
    batch, heads, tokens, dim = query.shape
    context = key.shape[2]
    if mask is not None:
        mask = mask[..., :context].float().contiguous()
        mask = mask.view(*[1] * (4 - mask.ndim), *mask.shape)
        mask = mask.expand(-1, -1, -1, context).contiguous()
    states = query.detach().float().contiguous()
    if key.rows.centre is not None:
        added = key.rows.centre.products(states, context).mul_(scoring.scaling)
        mask = added if mask is None else mask + added
    probabilities = states.new_empty(batch, heads, tokens, context)
    out = states.new_empty(batch, tokens, heads, dim)
    digits = key.rows.digits
    of_digits = (None, None) if digits is None else (digits.place, digits.weight)
    backend.extension().attend_packed(
        states,
        *(key.packed, key.bits if digits is None else DIGIT, key.scale, key.zero, *of_digits),
        *(value.packed, value.bits, value.scale, value.zero, value.rows.factors),
        mask,
        scoring.scaling,
        0.0 if scoring.softcap is None else scoring.softcap,
        scoring.softmax_bits,
        scoring.relative,
        probabilities,
        out,
        pool(),
    )
    return out.to(query.dtype), probabilities.to(query.dtype)


def pack_states(
    states: Tensor,
    bits: int,
    scale: Tensor,
    zero: Tensor,
    packed: Tensor,
    feedback: Tensor | None,
) -> None:
    """See `quantine.kernels.kv_attention.packing.pack_states`."""
    _pack(states, scale, zero, feedback, bits, packed, None)


def state_codes(
    states: Tensor, scale: Tensor, zero: Tensor, feedback: Tensor | None, tops: Tensor
) -> Tensor:
    """See `quantine.kernels.kv_attention.state_codes.state_codes_reference`."""
    codes = torch.empty(states.shape, dtype=torch.uint8, device=states.device)
    _pack(states, scale, zero, feedback, 8, codes, tops)
    return codes


def _pack(
    states: Tensor,
    scale: Tensor,
    zero: Tensor,
    feedback: Tensor | None,
    bits: int,
    packed: Tensor,
    tops: Tensor | None,
) -> None:
    floats = states.detach().float()
    floats = floats if floats.stride(3) == 1 else floats.contiguous()
    halves = None if feedback is None else feedback.contiguous().view(torch.int16)
    backend.extension().pack_states(floats, scale, zero, halves, bits, packed, tops, pool())
