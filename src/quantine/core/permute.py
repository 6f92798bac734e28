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
        return torch.arange(len(strength))
    if group_size is None:
        return strength.argsort(descending=True, stable=True)
    groups: Tensor = strength.unflatten(0, (-1, group_size))
    first = groups.mean(1).argsort(descending=True, stable=True)
    within = groups.argsort(dim=1, descending=True, stable=True)
    starts = torch.arange(len(groups)).unsqueeze(1) * group_size
    return (within + starts)[first].flatten()


def inverse(order: Tensor) -> Tensor:
    """Where ``order`` puts each input: ``inverse(order)[order[j]] == j``."""
    result = torch.empty_like(order)
    result[order] = torch.arange(len(order))
    return result
