"""An attention function for transformers that rounds queries, keys, values and probabilities.

Models use it through transformers' registry of attention functions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from quantine.activations.centred_keys import check_from_first, positions_of
from quantine.activations.modules import SITES_NAME, AttentionSites
from quantine.core.overrides import is_overridden
from quantine.kernels.kv_attention import attend
from quantine.kernels.kv_attention.packed_states import PackedStates, RecordedStates
from quantine.kernels.kv_attention.scoring import Scoring

NAME: Final = "quantine"
"""Name of the attention function, in ``config._attn_implementation`` of a model."""


def register() -> None:
    """Register `attention` with transformers under `NAME`, with masks that are added to scores."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | RecordedStates,
    value: Tensor | RecordedStates,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    output_attentions: bool | None = None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention for ``module``, rounding where it holds `AttentionSites`.

    The signature is that of transformers' attention functions.

    Args:
        module: the model's attention module.
        query: ``[batch, heads, tokens, dim]``, before rounding.
        key, value: ``[batch, kv_heads, context, dim]``, before rounding, or packed: see
            `quantine.kernels.kv_attention.attend`.
        attention_mask: added to scores, broadcastable to ``[batch, heads, tokens, context]``; or
            booleans, false where a token is not seen; ``None`` for no mask.
        scaling: factor on products of queries and keys; ``None`` is ``dim ** -0.5``.
        dropout: share of probabilities that are dropped, in training mode only.
        softcap: bound of scores, see `quantine.kernels.kv_attention.scoring.Scoring`.
        output_attentions: false says that the caller does not read probabilities.
        position_ids: ``[batch or 1, tokens]`` int64, needed where keys have a centre.

    Returns:
        Outputs ``[batch, tokens, heads, dim]``, and probabilities ``[batch, heads, tokens,
        context]``, which may be ``None`` where ``output_attentions`` is false.
    """
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        hidden = torch.finfo(torch.float32).min
        attention_mask = torch.where(attention_mask, 0.0, hidden)
    if output_attentions is None:  # as transformers decides what its models give
        output_attentions = bool(
            getattr(getattr(module, "config", None), "output_attentions", False)
        )
    sites = getattr(module, SITES_NAME, None)
    scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
    if isinstance(sites, AttentionSites):
        scoring = replace(scoring, softmax_bits=sites.softmax, relative=sites.relative)
        query = _through(sites.query, query)
        # Packed codes are these sites': rounding them again changes nothing.
        if not isinstance(key, PackedStates | RecordedStates):
            key = _keys(sites, key, attention_mask, position_ids)
        elif sites.centre is not None:
            check_from_first(key.shape[2], attention_mask, position_ids)
        if not isinstance(value, PackedStates | RecordedStates):
            value = _through(sites.value, value)
    return attend(
        query,
        key,
        value,
        attention_mask,
        scoring,
        dropout if module.training else 0.0,
        keep=output_attentions,
    )


def _keys(
    sites: AttentionSites, key: Tensor, mask: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    """Round keys ``[batch, kv_heads, context, dim]``, less their centre if they have one."""
    if sites.centre is None:
        return _through(sites.key, key)
    centre = sites.centre.of(key, positions_of(key.shape[2], mask, position_ids))
    return (_through(sites.key, key.float() - centre) + centre).to(key.dtype)


def _through(site: nn.Module, x: Tensor) -> Tensor:
    """Round queries, keys or values of all heads with the module ``site``.

    Args:
        site: takes and returns ``[batch, tokens, heads * dim]``.
        x: ``[batch, heads, tokens, dim]``, the shape of the result.
    """
    # A compiler does not look into modules, and leaves out what changes nothing.
    plain = type(site) is nn.Identity and not torch.compiler.is_compiling()
    if plain and not is_overridden(site):
        return x
    flat: Tensor = site(x.transpose(1, 2).flatten(2))
    heads: Tensor = flat.unflatten(2, (x.shape[1], x.shape[3]))
    return heads.transpose(1, 2)
