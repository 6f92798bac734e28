"""Putting a block's channels into another order without changing what it computes.

RPTQ (arXiv 2304.01089, section 3.3). The order goes into norms and weights, so nothing is moved at
run time but what a norm writes anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantine.activations.modules import PermutedNorm
from quantine.core.permute import order_within_heads
from quantine.families.family import Link, Rows
from quantine.families.layers import is_transposed


def reorder(block: nn.Module, link: Link, order: Tensor, heads: int = 1) -> None:
    """Rewrite ``block`` along ``link``.

    Args:
        order: ``[channels]`` int64 of what the producers write: place ``j`` gets channel
            ``order[j]``.
        heads: heads of the producers, which ``order`` keeps apart where ``link.per_head``.
    """
    if link.fold == "attention":
        return
    for path in link.producers:
        if link.fold == "gather":
            permute_norm(block, path, order)
        else:
            permute_outputs(block.get_submodule(path), order, link.rows, heads)
    for path in link.consumers:
        permute_inputs(block.get_submodule(path), order, heads)


def permute_norm(block: nn.Module, path: str, order: Tensor) -> None:
    """Let the norm at ``path`` write its channels in ``order``."""
    parent, _, leaf = path.rpartition(".")
    norm = PermutedNorm(block.get_submodule(path), order.to(torch.int32))
    setattr(block.get_submodule(parent), leaf, norm)


def permute_outputs(module: nn.Module, order: Tensor, rows: Rows = "parts", heads: int = 1) -> None:
    """Let a matrix write those outputs that ``rows`` names in ``order``; see `Link.rows`."""
    axis = 1 if is_transposed(module) else 0
    weight = module.get_parameter("weight")
    whole = _order_of_rows(weight.shape[axis], order, rows, heads)
    _replace(module, weight, whole, axis)
    bias = getattr(module, "bias", None)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach()[whole], requires_grad=False)


def _order_of_rows(count: int, order: Tensor, rows: Rows, heads: int) -> Tensor:
    """An order of all ``count`` rows of a producer."""
    channels = len(order)
    whole = torch.arange(count, device=order.device)
    if rows == "parts":
        return (order + whole[::channels].unsqueeze(1)).flatten()
    if rows == "last":
        whole[-channels:] = order + count - channels
        return whole
    places = whole.view(heads, -1)[:, -channels // heads :].flatten()
    whole[places] = places[order]
    return whole


def permute_inputs(module: nn.Module, order: Tensor, heads: int) -> None:
    """Let a matrix read inputs in ``order``; each of ``heads`` has copies if it reads more."""
    weight, axis = module.get_parameter("weight"), 0 if is_transposed(module) else 1
    copies = weight.shape[axis] // len(order)
    _replace(module, weight, order_within_heads(order, heads, copies), axis)


def _replace(module: nn.Module, weight: Tensor, order: Tensor, axis: int) -> None:
    ordered = torch.index_select(weight.detach(), axis, order)
    module.weight = nn.Parameter(ordered, requires_grad=False)
