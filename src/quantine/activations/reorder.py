"""Putting a block's channels into another order without changing what the block computes.

See RPTQ (arXiv 2304.01089, section 3.3). The order goes into the weights and into what norms write,
so nothing else is moved at run time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantine.activations.modules import PermutedNorm
from quantine.core.permute import order_within_heads
from quantine.families.family import Link, Rows
from quantine.families.layers import is_transposed


def reorder(block: nn.Module, link: Link, order: Tensor, heads: int = 1) -> None:
    """Apply one reorder of RPTQ to ``block``, in place: its producers and its consumers.

    Reorders that only look up clusters (``link.fold`` is ``"attention"``) change nothing.

    Args:
        link: which matrices and norms write and read the channels.
        order: ``[channels]`` int64: of the channels that producers write, place ``j`` gets channel
            ``order[j]``.
        heads: number of heads that these channels consist of; 1 where they are not of heads. Where
            ``link.per_head``, ``order`` keeps channels within their heads.
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
    """Replace the norm at ``path`` by one that writes its channels in ``order``.

    Args:
        path: path of the norm inside ``block``.
        order: ``[channels]`` integers: place ``j`` gets channel ``order[j]``.
    """
    parent, _, leaf = path.rpartition(".")
    norm = PermutedNorm(block.get_submodule(path), order.to(torch.int32))
    setattr(block.get_submodule(parent), leaf, norm)


def permute_outputs(module: nn.Module, order: Tensor, rows: Rows = "parts", heads: int = 1) -> None:
    """Reorder outputs of a matrix: rows of its weight and entries of its bias.

    Args:
        module: a ``Linear``, or GPT-2's ``Conv1D``, which stores its weight transposed.
        order: ``[channels]`` int64: place ``j`` gets channel ``order[j]``.
        rows: which outputs are meant if there are more than channels, see `Link.rows`.
        heads: number of heads that the outputs consist of, for ``"interleaved"``.
    """
    weight, axis = module.get_parameter("weight"), _axis_of_outputs(module)
    whole = order_of_outputs(module, order, rows, heads)
    _replace(module, weight, whole, axis)
    bias = getattr(module, "bias", None)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach()[whole], requires_grad=False)


def order_of_outputs(
    module: nn.Module, order: Tensor, rows: Rows = "parts", heads: int = 1
) -> Tensor:
    """The order of all outputs of a matrix, ``[out]`` int64, those that stay in place included.

    The arguments are those of `permute_outputs`.
    """
    places = places_of_channels(module, len(order), rows, heads)
    count = module.get_parameter("weight").shape[_axis_of_outputs(module)]
    whole = torch.arange(count, device=order.device)
    for part in places.to(order.device):
        whole[part] = part[order]
    return whole


def places_of_channels(module: nn.Module, channels: int, rows: Rows, heads: int) -> Tensor:
    """Which outputs of a matrix write ``channels`` channels, ``[parts, channels]`` int64.

    Args:
        module, rows, heads: as for `permute_outputs`.
        channels: number of channels; they are written once, or with ``"parts"`` perhaps several
            times.
    """
    weight = module.get_parameter("weight")
    every = torch.arange(weight.shape[_axis_of_outputs(module)], device=weight.device)
    if rows == "parts":
        return every.view(-1, channels)
    if rows == "last":
        return every[-channels:].unsqueeze(0)
    return every.view(heads, -1)[:, -channels // heads :].reshape(1, -1)


def _axis_of_outputs(module: nn.Module) -> int:
    return 1 if is_transposed(module) else 0


def permute_inputs(module: nn.Module, order: Tensor, heads: int) -> None:
    """Reorder the inputs of a matrix: columns of its weight.

    Args:
        module: a ``Linear``, or GPT-2's ``Conv1D``, which stores its weight transposed.
        order: ``[channels]`` int64: place ``j`` gets channel ``order[j]``.
        heads: number of heads that ``order`` consists of. Where the matrix has more inputs (heads
            of keys and values that several heads of queries share), each head comes several times
            in a row.
    """
    weight, axis = module.get_parameter("weight"), 0 if is_transposed(module) else 1
    copies = weight.shape[axis] // len(order)
    _replace(module, weight, order_within_heads(order, heads, copies), axis)


def _replace(module: nn.Module, weight: Tensor, order: Tensor, axis: int) -> None:
    ordered = torch.index_select(weight.detach(), axis, order)
    module.weight = nn.Parameter(ordered, requires_grad=False)
