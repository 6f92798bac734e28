"""Values of attention that are rotated within their heads by the weights that make and read them.

A rotation spreads what single channels of a head are loud by over all of them (QuaRot, arXiv
2404.00456), so that one factor for each token of a head says how loud it is. Attention mixes tokens
and leaves channels alone, so the matrix behind takes the rotation back, and nothing is computed
while the model runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantine.activations.reorder import places_of_channels
from quantine.core.device import CPU
from quantine.core.rotation import Rotation
from quantine.families.family import Link
from quantine.families.heads import Heads
from quantine.families.layers import is_transposed


def rotate_values(block: nn.Module, link: Link, heads: Heads) -> None:
    """Rotate the values of every head of ``block``, in place; it computes the same.

    Args:
        block: with float weights.
        link: the reorder R3: which matrices write values, and which read what attention makes of
            them.
        heads: the model's numbers of heads.
    """
    rotation = Rotation(_width(block, link, heads), seed=None)
    for path in link.producers:
        module = block.get_submodule(path)
        places = _places(module, link, heads, rotation.width)
        weight = module.get_parameter("weight").detach()
        rows = weight.T.clone() if is_transposed(module) else weight.clone()
        rows[places] = _turned(rows[places].T, rotation).T.to(rows.dtype)
        _replace(module, rows)
        bias = getattr(module, "bias", None)
        if bias is not None:
            turned = bias.detach().clone()
            turned[places] = _turned(turned[places], rotation).to(turned.dtype)
            module.bias = nn.Parameter(turned, requires_grad=False)
    for path in link.consumers:
        module = block.get_submodule(path)
        weight = module.get_parameter("weight").detach()
        rows = weight.T if is_transposed(module) else weight
        _replace(module, _turned(rows, rotation).to(rows.dtype))


def turns_of_outputs(block: nn.Module, link: Link, heads: Heads) -> dict[str, Tensor]:
    """How `rotate_values` turns the outputs of matrices, by path in ``block``.

    ``[out, out]`` float32 on the CPU: an orthogonal matrix that outputs are multiplied with from
    the right; outputs that are no values stay.
    """
    rotation = Rotation(_width(block, link, heads), seed=None)
    found: dict[str, Tensor] = {}
    for path in link.producers:
        module = block.get_submodule(path)
        weight = module.get_parameter("weight")
        outputs = weight.shape[1 if is_transposed(module) else 0]
        turn = torch.eye(outputs, dtype=torch.float32, device=CPU)
        places = _places(module, link, heads, rotation.width).cpu()
        turn[:, places] = _turned(turn[:, places], rotation)
        found[path] = turn
    return found


def _width(block: nn.Module, link: Link, heads: Heads) -> int:
    """Number of channels of a head."""
    reader = block.get_submodule(link.consumers[0])
    inputs = reader.get_parameter("weight").shape[0 if is_transposed(reader) else 1]
    return inputs // heads.queries


def _places(module: nn.Module, link: Link, heads: Heads, width: int) -> Tensor:
    """The outputs of a matrix that are values, ``[values]`` int64, head by head."""
    return places_of_channels(module, heads.keys * width, link.rows, heads.keys).flatten()


def _turned(x: Tensor, rotation: Rotation) -> Tensor:
    """``x`` ``[..., heads * width]``, every head times the rotation, float32."""
    return rotation.turned(x.float().unflatten(-1, (-1, rotation.width))).flatten(-2)


def _replace(module: nn.Module, rows: Tensor) -> None:
    stored = rows.T.contiguous() if is_transposed(module) else rows
    module.weight = nn.Parameter(stored, requires_grad=False)
