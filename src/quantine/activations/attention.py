"""Attention with rounded queries, keys, values and probabilities, by transformers' own door.

The meaning, in plain PyTorch. Scores are taken in float32 after rounding, as from codes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from quantine.activations.modules import SITES_NAME, AttentionSites
from quantine.kernels.kv_attention import attend
from quantine.kernels.kv_attention.packed_states import PackedStates
from quantine.kernels.kv_attention.scoring import Scoring

NAME: Final = "quantine"
"""Of the attention function, in ``config._attn_implementation``."""


def register() -> None:
    """Make `attention` known to transformers, with the mask that it adds to scores."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    output_attentions: bool | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a module that may hold `AttentionSites`.

    Args:
        query: ``[batch, heads, tokens, dim]``.
        key, value: ``[batch, kv_heads, context, dim]``, before rounding, or `PackedStates`.
        attention_mask: added to scores, broadcastable to ``[batch, heads, tokens, context]``; or
            booleans, false where a token is not seen.
        output_attentions: false where the caller says that nobody reads probabilities.

    Returns:
        Outputs ``[batch, tokens, heads, dim]`` and probabilities, if they are kept.
    """
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        hidden = torch.finfo(torch.float32).min
        attention_mask = torch.where(attention_mask, 0.0, hidden)
    sites = getattr(module, SITES_NAME, None)
    scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
    if isinstance(sites, AttentionSites):
        scoring = replace(scoring, softmax_bits=sites.softmax, relative=sites.relative)
        query = _through(sites.query, query)
        key, value = _through(sites.key, key), _through(sites.value, value)
    return attend(
        query,
        key,
        value,
        attention_mask,
        scoring,
        dropout if module.training else 0.0,
        keep=output_attentions is not False,
    )


def _through(site: nn.Module, x: Tensor) -> Tensor:
    """``x`` ``[batch, heads, tokens, dim]`` through what takes ``[batch, tokens, channels]``."""
    if isinstance(site, nn.Identity) and not site._forward_pre_hooks:
        return x
    if isinstance(x, PackedStates):
        return x  # its codes are this site's: rounding them again changes nothing
    flat: Tensor = site(x.transpose(1, 2).flatten(2))
    heads: Tensor = flat.unflatten(2, (x.shape[1], x.shape[3]))
    return heads.transpose(1, 2)
