"""What a norm of hidden states does, found by trying it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from quantine.core.device import CPU
from quantine.core.rotation import Rotation
from quantine.core.transform_spec import ROTATE
from quantine.errors import FamilyError

TOLERANCE: Final = 1e-4
"""Largest difference of two norms' outputs, whose numbers are about 1, that are the same."""


@dataclass(frozen=True)
class NormKind:
    """What a norm does before its weight and bias, if any, are a factor and a summand.

    Attributes:
        takes_mean_off: whether it subtracts the mean over channels.
        offset: what is added to its weight before it is multiplied: 0, or 1 as Gemma does.
    """

    takes_mean_off: bool
    offset: int


def norm_kind(norm: nn.Module, path: str, width: int) -> NormKind:
    """Try what ``norm`` does.

    Args:
        norm: a module; its weights may be on the meta device.
        path: its path, for messages.
        width: number of channels of hidden states.

    Raises:
        FamilyError: rotating its input does not rotate its output, or a louder input makes a louder
            one; or its weight is no factor, its bias no summand of its output.
    """
    parameters = dict(norm.named_parameters())
    shapes = {tuple(parameter.shape) for parameter in parameters.values()}
    if set(parameters) - {"weight", "bias"} or shapes - {(width,)}:
        raise _unlike(path, norm)
    tried = copy.deepcopy(norm).to_empty(device=CPU)
    try:
        kind = _kind(tried, width)
    # What modules raise that are no norm of one tensor.
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _unlike(path, norm) from error
    if kind is None:
        raise _unlike(path, norm)
    return kind


def _kind(norm: nn.Module, width: int) -> NormKind | None:
    """What ``norm``, whose parameters are overwritten, does; ``None`` if it is not understood."""
    names = {name for name, _ in norm.named_parameters()}
    generator = torch.Generator("cpu").manual_seed(0)
    x, gain, shift = torch.randn(
        3, 4, width, generator=generator, dtype=torch.float32, device=CPU
    ).unbind()
    ones, zeros = torch.ones_like(gain[0]), torch.zeros_like(gain[0])

    def output(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        values = {"weight": weight, "bias": bias}
        with torch.no_grad():
            for name, parameter in norm.named_parameters():
                parameter.copy_(values[name])
            made: Tensor = norm(x)
        return made

    def same(one: Tensor, other: Tensor) -> bool:
        return torch.allclose(one, other, atol=TOLERANCE)

    # With a weight of 0, only a norm that adds 1 to it puts out something.
    offset = int("weight" in names and not same(output(x, zeros, zeros), torch.zeros_like(x)))
    plain = output(x, ones - offset, zeros)
    scaled = plain * (gain[0] + offset if "weight" in names else 1)
    scaled = scaled + (shift[0] if "bias" in names else 0)
    takes_off = same(output(x + 1, ones - offset, zeros), plain)
    rotation = Rotation(width, 0, keeps_ones=takes_off)
    turned = output(rotation.turned(x), ones - offset, zeros)
    understood = (
        same(output(x, gain[0], shift[0]), scaled)
        and same(turned, rotation.turned(plain))
        and same(output(2 * x, ones - offset, zeros), plain)
    )
    return NormKind(takes_off, offset) if understood else None


def _unlike(path: str, norm: nn.Module) -> FamilyError:
    return FamilyError(
        f"{path}, a {type(norm).__name__}, is no norm whose weight and bias matrices could take "
        f"over: leave out `{ROTATE}`"
    )
