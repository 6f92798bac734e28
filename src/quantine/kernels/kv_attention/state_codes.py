"""Codes of keys and values whose channels have different numbers of bits, or tokens factors."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.core.ambient import without_autocast
from quantine.core.grid import encode_up_to
from quantine.kernels import backend
from quantine.kernels.integer.token_factors import factors, steepness
from quantine.kernels.kv_attention import cpu
from quantine.kernels.kv_attention.feedback import encode_fed

SMALLEST: Final = 2.0**-14
"""Smallest factor of a token, the smallest normal number of float16, as which caches hold it."""


@torch.library.custom_op("quantine::state_codes", mutates_args=())
def state_codes(
    states: Tensor, scale: Tensor, zero: Tensor, feedback: Tensor | None, widths: Tensor
) -> Tensor:
    """Round keys or values to codes of different numbers of bits.

    Args:
        states: ``[batch, heads, tokens, dim]`` of any float dtype.
        scale, zero: ``[heads, dim]`` float32, the grids.
        feedback: ``[heads, dim, dim]`` float16, see `quantine.kernels.kv_attention.feedback`;
            ``None`` rounds to nearest.
        widths: ``[heads, dim]`` uint8, bits of the codes of each channel, 0 to 8.

    Returns:
        ``[batch, heads, tokens, dim]`` uint8.
    """
    tops = torch.exp2(widths.float()) - 1
    if backend.of(states, scale, zero, feedback, tops) == "native":
        return cpu.state_codes(states, scale, zero, feedback, tops)
    return state_codes_reference(states, scale, zero, feedback, tops)


@state_codes.register_fake
def _(
    states: Tensor, scale: Tensor, zero: Tensor, feedback: Tensor | None, widths: Tensor
) -> Tensor:
    return torch.empty(states.shape, dtype=torch.uint8, device=states.device)


def state_codes_reference(
    states: Tensor, scale: Tensor, zero: Tensor, feedback: Tensor | None, tops: Tensor
) -> Tensor:
    """What `state_codes` gives, in plain PyTorch.

    Args:
        states, scale, zero, feedback: as there.
        tops: ``[heads, dim]`` float32, the largest code of each channel.
    """
    tokens_first = states.detach().float().transpose(1, 2)
    if feedback is None:
        codes = encode_up_to(tokens_first, scale, zero, tops)
    else:
        with without_autocast(states.device):
            codes = encode_fed(tokens_first, scale, zero, feedback.float(), tops)
    return codes.transpose(1, 2).byte().contiguous()


def head_factors(states: Tensor, scale: Tensor, zero: Tensor, bits: int, reach: Tensor) -> Tensor:
    """The factor of each token in each head, by which it is divided before it is rounded.

    Args:
        states: ``[..., heads, dim]`` float32.
        scale, zero: ``[heads, dim]`` float32, the grids.
        bits: number of bits of one code.
        reach: ``[heads]`` float32, see `quantine.kernels.integer.token_factors.steepness`.

    Returns:
        ``[..., heads, 1]`` float32, numbers that float16 holds.
    """
    return as_held(factors(states, *steepness(scale, zero, bits, reach.unsqueeze(1))))


def as_held(factor: Tensor) -> Tensor:
    """The factors that caches hold for ``factor``: at least `SMALLEST`, and numbers of float16."""
    return factor.clamp(min=SMALLEST).half().float()
