"""Attention of many queries, tile by tile, so that scores stay in the processor's cache.

The meaning is `quantine.kernels.kv_attention.reference.attend_reference`, with products in float32.
Scores of a thousand tokens are some megabytes for each head, and each step of the softmax would
read and write all of them in main memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from quantine.core.activation_spec import UNQUANTIZED
from quantine.kernels.kv_attention.scoring import Scoring

TILE: Final = 2**17
"""Number of scores computed at once: half a megabyte of float32."""


def attend_in_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `quantine.kernels.kv_attention.reference.attend_reference`; no gradients, no dropout.

    Args:
        query, key, value, mask, scoring: as there.
        keep: whether to return the probabilities, which take most of the memory; else ``None`` is
            returned for them.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, context = key.shape[1], key.shape[2]
    shape = (batch, kv_heads, heads // kv_heads, tokens)
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Rounded states are floats that stand for codes: bfloat16 products would round them again.
    with torch.autocast(query.device.type, enabled=False):
        queries = query.to(dtype).mul(scoring.scaling).view(*shape, dim)
        keys, values = key.to(dtype).transpose(2, 3), value.to(dtype)
        out = query.new_empty(batch, tokens, *shape[1:3], dim)
        kept = query.new_zeros(*shape, context) if keep else None
        masks = None if mask is None else _expanded(mask, shape, context)
        for samples, rows, own in _tiles(*shape, context):
            hidden = None if masks is None else masks[samples, :, :, rows]
            seen = context if hidden is None else _seen(hidden)
            states = queries[samples, own, :, rows]
            scores = states.flatten(2, 3) @ keys[samples, own, :, :seen]
            scores = scores.view(*states.shape[:4], seen)
            if scoring.softcap is not None:
                scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
            if hidden is not None:
                scores += (hidden if hidden.shape[1] == 1 else hidden[:, own])[..., :seen]
            scores = _normalized(scores, scoring.softmax_bits, scoring.relative)
            if kept is not None:
                kept[samples, own, :, rows, :seen] = scores
            mixed = scores.flatten(2, 3) @ values[samples, own, :seen]
            out[samples, rows, own] = mixed.view(*states.shape).permute(0, 3, 1, 2, 4).to(out.dtype)
    return out.flatten(2, 3), None if kept is None else kept.flatten(1, 2)


def _tiles(
    batch: int, kv_heads: int, copies: int, tokens: int, context: int
) -> Iterator[tuple[slice, slice, slice]]:
    """Cut the work into tiles of about `TILE` scores: samples, query tokens and heads of keys.

    Args:
        copies: heads of queries that share a head of keys.
    """
    row = max(1, copies * context)
    rows = max(1, min(TILE // row, tokens))
    heads = max(1, min(TILE // (row * rows), kv_heads))
    samples = max(1, TILE // (row * rows * heads))
    for sample in range(0, batch, samples):
        for token in range(0, tokens, rows):
            for head in range(0, kv_heads, heads):
                yield (
                    slice(sample, sample + samples),
                    slice(token, token + rows),
                    slice(head, head + heads),
                )


def _expanded(mask: Tensor, shape: tuple[int, int, int, int], context: int) -> Tensor:
    """The mask as ``[batch, kv_heads, copies, tokens, context]``.

    Both ``kv_heads`` and ``copies`` are 1 where all heads have the same mask.

    Args:
        mask: broadcastable to ``[batch, heads, tokens, context]``.
        shape: ``(batch, kv_heads, copies, tokens)``.
    """
    batch, kv_heads, copies, tokens = shape
    mask = mask[..., :context]
    mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    heads = (kv_heads, copies) if mask.shape[1] > 1 else (1, 1)
    expanded: Tensor = mask.unflatten(1, heads).expand(batch, -1, -1, tokens, context)
    return expanded


def _seen(mask: Tensor) -> int:
    """Number of tokens from the start of the context up to the last one that any query sees.

    All tokens count where a query sees none, as its probabilities are then whatever softmax makes
    of them, and where the mask is not of floats.

    Args:
        mask: ``[..., context]``; the lowest number of its dtype hides a token.
    """
    if not mask.is_floating_point():
        return mask.shape[-1]
    visible = (mask > torch.finfo(mask.dtype).min).flatten(0, -2)
    if not bool(visible.any(1).all()):
        return mask.shape[-1]
    return int(visible.any(0).nonzero()[-1]) + 1


def _normalized(scores: Tensor, bits: int, relative: bool) -> Tensor:
    """Probabilities of ``scores`` ``[..., context]``, which are overwritten.

    Args:
        bits, relative: how they are rounded, see
            `quantine.kernels.kv_attention.reference.round_probabilities`; 16 bits leave them as
            they are.
    """
    top = 2**bits - 1
    if bits == UNQUANTIZED or not relative:
        probabilities = scores.softmax(-1)
        return probabilities if bits == UNQUANTIZED else probabilities.mul_(top).round_().div_(top)
    steps = scores.sub_(scores.amax(-1, keepdim=True)).exp_().mul_(top).round_()
    return steps.div_(steps.sum(-1, keepdim=True))
