"""The meaning of `quantine.kernels.kv_attention.attend`, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from quantine.core.activation_spec import UNQUANTIZED
from quantine.core.straight_through import straight_through
from quantine.kernels.kv_attention.scoring import Scoring


def attend_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention with grouped heads and probabilities that may be rounded.

    Gradients pass the rounding as if it were not there.

    Args:
        query: ``[batch, heads, tokens, dim]`` of any float dtype.
        key, value: ``[batch, kv_heads, context, dim]``; ``kv_heads`` divides ``heads``.
        mask: added to scores, broadcastable to ``[batch, heads, tokens, context]``; of a longer
            context the first entries count. ``None`` for no mask.
        scoring: how products become probabilities.
        dropout: share of probabilities that are set to zero at random.

    Returns:
        Outputs ``[batch, tokens, heads, dim]`` and probabilities ``[batch, heads, tokens,
        context]``, in the dtype of ``query``.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, context = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, -1, dim)
    scores = (grouped @ key.transpose(2, 3)).view(batch, heads, tokens, context) * scoring.scaling
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if mask is not None:
        scores = scores + mask[..., :context]
    probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if scoring.softmax_bits != UNQUANTIZED:
        exact = probabilities
        probabilities = round_probabilities(exact.detach(), scoring.softmax_bits, scoring.relative)
        if torch.is_grad_enabled() and exact.requires_grad:
            probabilities = straight_through(exact, probabilities)
    probabilities = drop(probabilities.to(query.dtype), dropout)
    mixed = probabilities.view(batch, kv_heads, -1, context) @ value
    return mixed.view(batch, heads, tokens, dim).transpose(1, 2).contiguous(), probabilities


def round_probabilities(probabilities: Tensor, bits: int, relative: bool) -> Tensor:
    """Round attention probabilities to a fixed grid of ``2**bits`` values from 0 to 1.

    Args:
        probabilities: ``[..., context]`` float32, whose rows sum to one.
        bits: number of bits of one code.
        relative: round the ratio of each probability to the largest of its row, then scale rows to
            sum to one again. Otherwise the probabilities themselves are rounded, as in RPTQ's
            published code: in a long context most are less than half a step and become zero.

    Returns:
        Float32 of the same shape.
    """
    top = 2**bits - 1
    if not relative:
        return probabilities.mul(top).round_().div_(top)
    steps = (probabilities / probabilities.amax(-1, keepdim=True)).mul_(top).round_()
    return steps / steps.sum(-1, keepdim=True)
