"""Attention over packed keys and values: the native kernel, and the PyTorch meaning of it.

The meaning is attention over the decoded floats. The kernel multiplies codes: scores are
``(q * s_k) . c_k - q . (s_k z_k)`` and outputs ``s_v * (p . c_v - z_v * sum p)``, so that scales
and zero points are met once for each query.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from quantine.core.activation import UNQUANTIZED
from quantine.kernels import backend
from quantine.kernels.packed_states import PackedStates
from quantine.kernels.threads import pool
from quantine.kernels.tiled_attention import TILE, attend_in_tiles

MOST_ROWS: Final = 64
"""Queries sharing a head of keys up to which codes are multiplied as they are. For more, PyTorch
multiplies decoded floats."""
TILED: Final = 16
"""Tokens from which many scores are made tile by tile: fewer do not make up for keys and values
turned into float32."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    softmax_bits: int = UNQUANTIZED,
    relative: bool = True,
    dropout: float = 0.0,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention of ``query`` ``[batch, heads, tokens, dim]``; see `attend_reference`.

    Where keys and values are `PackedStates` of the CPU, a few queries meet their codes.

    Args:
        keep: whether probabilities are wanted; there may be ``None`` otherwise.
    """
    rest = (mask, scaling, softcap, softmax_bits, relative)
    learning = _learning(query, key, value, *(() if mask is None else (mask,)))
    if dropout > 0 or learning or not _on_cpu(query, key, value):
        return attend_reference(query, key, value, *rest, dropout)
    native = backend.native()
    if (
        native is None
        or not isinstance(key, PackedStates)
        or not isinstance(value, PackedStates)
        or not _few(query, key)
    ):
        if _in_tiles(query, key):
            return attend_in_tiles(query, key, value, *rest, keep)
        return attend_reference(query, key, value, *rest)
    batch, heads, tokens, dim = query.shape
    context = key.shape[2]
    if mask is not None:
        mask = mask[..., :context].float().contiguous()
        mask = mask.view(*[1] * (4 - mask.ndim), *mask.shape)
        mask = mask.expand(-1, -1, -1, context).contiguous()
    probabilities = torch.empty(batch, heads, tokens, context)
    out = torch.empty(batch, tokens, heads, dim)
    native.attend_packed(
        query.detach().float().contiguous(),
        *(key.packed, key.bits, key.scale, key.zero),
        *(value.packed, value.bits, value.scale, value.zero),
        mask,
        scaling,
        0.0 if softcap is None else softcap,
        softmax_bits,
        relative,
        probabilities,
        out,
        pool(),
    )
    return out.to(query.dtype), probabilities.to(query.dtype)


def attend_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    softmax_bits: int = UNQUANTIZED,
    relative: bool = True,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of ``query`` ``[batch, heads, tokens, dim]``.

    Args:
        key, value: ``[batch, kv_heads, context, dim]``.
        mask: added to scores, broadcastable to ``[batch, heads, tokens, context]``; may be longer.
        scaling: of scores.
        softcap: scores are bounded by it, smoothly.
        softmax_bits: probabilities are rounded to these; 16 for none.
        relative: see `round_probabilities`.
        dropout: share of probabilities to drop.

    Returns:
        Outputs ``[batch, tokens, heads, dim]`` and probabilities ``[batch, heads, tokens,
        context]``.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, context = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, -1, dim)
    scores = (grouped @ key.transpose(2, 3)).view(batch, heads, tokens, context) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask[..., :context]
    probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if softmax_bits != UNQUANTIZED:
        probabilities = round_probabilities(probabilities, softmax_bits, relative)
    probabilities = drop(probabilities.to(query.dtype), dropout)
    mixed = probabilities.view(batch, kv_heads, -1, context) @ value
    return mixed.view(batch, heads, tokens, dim).transpose(1, 2).contiguous(), probabilities


def round_probabilities(probabilities: Tensor, bits: int, relative: bool) -> Tensor:
    """Probabilities ``[..., context]`` on a fixed grid of ``2**bits`` values from 0 to 1.

    Args:
        relative: the ratio of each to the largest of its row is rounded, and their sum is one
            again. Otherwise they themselves are, as RPTQ's published code does: in a long context
            most are less than half a step, and are lost.
    """
    top = 2**bits - 1
    if not relative:
        return probabilities.mul(top).round_().div_(top)
    steps = (probabilities / probabilities.amax(-1, keepdim=True)).mul_(top).round_()
    return steps / steps.sum(-1, keepdim=True)


def _learning(*states: Tensor) -> bool:
    """Whether a gradient is wanted, or a graph: only the reference has one."""
    wanted = torch.is_grad_enabled() and any(state.requires_grad for state in states)
    return wanted or backend.is_recorded()


def _on_cpu(*states: Tensor) -> bool:
    return all(state.device.type == "cpu" for state in states)


def _in_tiles(query: Tensor, key: Tensor) -> bool:
    """Whether there are more scores than one tile has."""
    return query.shape[2] >= TILED and query.shape[:3].numel() * key.shape[2] > TILE


def _few(query: Tensor, key: Tensor) -> bool:
    """Whether so few queries share a head of keys that its codes are better not decoded."""
    shared = query.shape[1] // key.shape[1] * query.shape[2]
    return 0 < shared <= MOST_ROWS and query.shape[0] > 0
