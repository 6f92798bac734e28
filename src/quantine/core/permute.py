"""Orders of a matrix's inputs: in which order they are solved, and how an order is inverted."""

from __future__ import annotations

import torch
from torch import Tensor


def input_order(strength: Tensor, act_order: bool, group_size: int | None = None) -> Tensor:
    """The order in which error feedback rounds the inputs of a matrix (act-order).

    Args:
        strength: ``[in]`` float, second moment of each input: the diagonal of the Hessian.
        act_order: whether inputs with the largest second moment come first; otherwise they keep
            their order.
        group_size: number of consecutive inputs that stay together, in act-order: groups are
            ordered by their mean strength, and inputs within each group by their own. ``None``
            orders inputs freely.

    Returns:
        ``[in]`` int64: position ``j`` is input ``order[j]``.
    """
    if not act_order:
        return torch.arange(len(strength), device=strength.device)
    if group_size is None:
        return strength.argsort(descending=True, stable=True)
    groups: Tensor = strength.unflatten(0, (-1, group_size))
    first = groups.mean(1).argsort(descending=True, stable=True)
    within = groups.argsort(dim=1, descending=True, stable=True)
    starts = torch.arange(len(groups), device=strength.device).unsqueeze(1) * group_size
    return (within + starts)[first].flatten()


def is_order(order: Tensor) -> bool:
    """Whether the integers ``order`` ``[n]`` name every place from 0 to ``n - 1`` once."""
    places = order.long()
    if not bool(((places >= 0) & (places < len(places))).all()):
        return False
    return bool((places.bincount(minlength=len(places)) == 1).all())


def inverse(order: Tensor) -> Tensor:
    """The position that ``order`` gives each input: ``inverse(order)[order[j]] == j``."""
    result = torch.empty_like(order)
    result[order] = torch.arange(len(order), device=order.device)
    return result


def order_within_heads(order: Tensor, heads: int, copies: int) -> Tensor:
    """Extend an order of channels within attention heads to repeated heads.

    With grouped-query attention, each key and value head serves several query heads, so the input
    of the output projection has several heads for each one that ``order`` knows.

    Args:
        order: ``[channels]`` int64 that keeps channels in their heads, see
            `quantine.rptq.clusters.Clusters.order`.
        heads: number of heads in ``order``.
        copies: number of consecutive heads that take the place of each.

    Returns:
        ``[channels * copies]`` int64.
    """
    width = len(order) // heads
    first = torch.arange(heads * copies, device=order.device).unsqueeze(1) * width
    local = order.view(heads, width) - first[:heads]
    return (local.repeat_interleave(copies, 0) + first).flatten()
