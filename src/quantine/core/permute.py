"""Orders of a matrix's inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def input_order(strength: Tensor, act_order: bool, group_size: int | None = None) -> Tensor:
    """The order in which error feedback rounds inputs.

    Args:
        strength: ``[in]`` second moment of each input, the Hessian's diagonal.
        act_order: strongest input first; else the given order.
        group_size: keeps runs of this many consecutive inputs together: runs are ordered by their
            mean strength, and inputs within each. ``None`` orders inputs freely.

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


def inverse(order: Tensor) -> Tensor:
    """Where ``order`` puts each input: ``inverse(order)[order[j]] == j``."""
    result = torch.empty_like(order)
    result[order] = torch.arange(len(order), device=order.device)
    return result


def order_within_heads(order: Tensor, heads: int, copies: int) -> Tensor:
    """An order of channels that stay in their heads, for channels of which each head has copies.

    Args:
        order: ``[channels]`` int64, see `quantine.rptq.clusters.Clusters.order`.
        heads: heads that ``order`` consists of.
        copies: heads that take the place of each, one after another.

    Returns:
        ``[channels * copies]`` int64.
    """
    width = len(order) // heads
    first = torch.arange(heads * copies, device=order.device).unsqueeze(1) * width
    local = order.view(heads, width) - first[:heads]
    return (local.repeat_interleave(copies, 0) + first).flatten()
