"""The centre of a block's keys, as calibration finds it: their mean before rotary embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantine.activations.centred_keys import CentredKeys
from quantine.errors import FamilyError
from quantine.families.rotary import turns_of


def centre_of_keys(means: Tensor, heads: int, model: nn.Module) -> CentredKeys:
    """What the keys of a block are centred by.

    Each pair of channels is turned back by the angle of its token, and then the mean over tokens is
    taken. Models pair a channel with the one beside it, or half of what is turned away, or do not
    turn the keys of some blocks at all. The right way is told by the means: turned back the wrong
    way, most of them cancel.

    Args:
        means: ``[tokens, channels]`` float32, mean keys after rotary embeddings by position from 0;
            channels of one head after another.
        heads: number of heads.
        model: has the rotary embeddings.

    Raises:
        FamilyError: it has none whose angles are fixed, or more angles than channels.
    """
    turns = turns_of(model).to(means.device)
    keys = means.unflatten(1, (heads, -1))
    if 2 * len(turns) > keys.shape[2]:
        raise FamilyError(
            f"{2 * len(turns)} channels of heads of {keys.shape[2]} would be turned by rotary "
            "embeddings: leave out -centred (centred_keys)"
        )
    later = keys[1:] if len(keys) > 1 else keys.new_zeros(1, *keys.shape[1:])
    found = [_waves(later, turns, beside) for beside in (False, True)]
    found.append(_waves(later, turns[:0], False))
    strength = [_strength(*one) for one in found]
    wave, of_channels = found[strength.index(max(strength))]
    cos, sin = (part.flatten().clone() for part in wave)
    return CentredKeys(means[0].clone(), cos, sin, of_channels.repeat(heads))


def _waves(keys: Tensor, turns: Tensor, beside: bool) -> tuple[Tensor, Tensor]:
    """The waves that mean keys have, if channels are paired in one way.

    Args:
        keys: ``[tokens, heads, dim]`` float32 at positions from 1.
        turns: ``[pairs]`` float32.
        beside: whether a channel is paired with the one beside it.

    Returns:
        Waves ``[2, heads, dim]``, see `quantine.kernels.kv_attention.key_centre.KeyCentre`, and
        the angle of each channel ``[dim]``; 0 for those that are not turned.
    """
    pairs = turns.new_tensor(range(len(turns)), dtype=torch.int64)
    first, second = (2 * pairs, 2 * pairs + 1) if beside else (pairs, pairs + len(pairs))
    positions = torch.arange(1, len(keys) + 1, dtype=torch.float32, device=keys.device)
    angles = positions[:, None, None] * turns
    cos, sin = angles.cos(), angles.sin()
    one, other = keys[..., first], keys[..., second]
    real = (one * cos + other * sin).mean(0)
    imaginary = (other * cos - one * sin).mean(0)
    # Channels that are not turned have a mean.
    wave = torch.stack([keys.mean(0), torch.zeros_like(keys[0])])
    wave[0, :, first], wave[1, :, first] = real, -imaginary
    wave[0, :, second], wave[1, :, second] = imaginary, real
    of_channels = turns.new_zeros(keys.shape[2])
    of_channels[first] = of_channels[second] = turns
    return wave, of_channels


def _strength(wave: Tensor, of_channels: Tensor) -> float:
    """The square of a centre, on average over positions; arguments as `_waves` gives them."""
    return float((wave.square().sum(0) * torch.where(of_channels > 0, 0.5, 1.0)).sum())
