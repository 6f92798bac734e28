"""Attention of many queries, tile by tile, so that scores stay in the processor's cache.

The meaning is `quantine.kernels.kv_attention.attend_reference`, with products in float32. Scores of
a thousand tokens are some megabytes for each head, and each step of the softmax would read and
write all of them in main memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from quantine.core.activation import UNQUANTIZED

TILE: Final = 2**17
"""Scores that are worked on at once: half a megabyte."""


def attend_in_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    softmax_bits: int,
    relative: bool,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """What `attend_reference` computes, without gradients and dropout.

    Args:
        keep: return the probabilities, too, which take most of the memory; else ``None``.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, context = key.shape[1], key.shape[2]
    copies = heads // kv_heads
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Rounded states are floats that stand for codes: bfloat16 products would round them again.
    with torch.autocast(query.device.type, enabled=False):
        queries = query.to(dtype).mul(scaling).view(batch, kv_heads, copies, tokens, dim)
        keys, values = key.to(dtype).transpose(2, 3), value.to(dtype)
        out = query.new_empty(batch, tokens, heads, dim)
        kept = query.new_zeros(batch, heads, tokens, context) if keep else None
        masks = None if mask is None else _expanded(mask, batch, tokens, context)
        for sample, rows in _tiles(batch, tokens, max(1, TILE // max(1, copies * context))):
            hidden = None if masks is None else masks[sample, :, rows]
            seen = context if hidden is None else _seen(hidden)
            for head in range(kv_heads):
                own = slice(head * copies, (head + 1) * copies)
                states = queries[sample, head, :, rows]
                scores = states.flatten(0, 1) @ keys[sample, head, :, :seen]
                scores = scores.view(*states.shape[:2], seen)
                if softcap is not None:
                    scores.div_(softcap).tanh_().mul_(softcap)
                if hidden is not None:
                    scores += (hidden if len(hidden) == 1 else hidden[own])[..., :seen]
                scores = _normalized(scores, softmax_bits, relative)
                if kept is not None:
                    kept[sample, own, rows, :seen] = scores
                mixed = scores.flatten(0, 1) @ values[sample, head, :seen]
                out[sample, rows, own] = mixed.view(*states.shape).transpose(0, 1).to(out.dtype)
    return out, kept


def _tiles(batch: int, tokens: int, rows: int) -> Iterator[tuple[int, slice]]:
    """Each sample's tokens, ``rows`` at a time."""
    for sample in range(batch):
        for first in range(0, tokens, rows):
            yield sample, slice(first, min(tokens, first + rows))


def _expanded(mask: Tensor, batch: int, tokens: int, context: int) -> Tensor:
    """``mask`` as ``[batch, 1 or heads, tokens, context]``."""
    mask = mask[..., :context]
    mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    return mask.expand(batch, -1, tokens, context)


def _seen(mask: Tensor) -> int:
    """How many tokens of the context, from the first, matter to ``mask`` ``[..., context]``.

    All of them, where a query sees none: its probabilities are then whatever softmax makes of that.
    """
    visible = (mask > torch.finfo(mask.dtype).min).flatten(0, -2)
    if not bool(visible.any(1).all()):
        return mask.shape[-1]
    return int(visible.any(0).nonzero()[-1]) + 1


def _normalized(scores: Tensor, bits: int, relative: bool) -> Tensor:
    """Probabilities, rounded as by `round_probabilities`, in place of ``scores``."""
    top = 2**bits - 1
    if bits == UNQUANTIZED or not relative:
        probabilities = scores.softmax(-1)
        return probabilities if bits == UNQUANTIZED else probabilities.mul_(top).round_().div_(top)
    steps = scores.sub_(scores.amax(-1, keepdim=True)).exp_().mul_(top).round_()
    return steps.div_(steps.sum(-1, keepdim=True))
