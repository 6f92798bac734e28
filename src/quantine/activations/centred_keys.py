"""Keys less what they differ little from, see `quantine.kernels.kv_attention.key_centre`."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.activations.stored import check_tensor
from quantine.core.fixed_dtypes import FixedDtypes
from quantine.errors import FamilyError
from quantine.kernels.kv_attention.key_centre import KeyCentre

CENTRE_NAME: Final = "centre"
"""Name of the child of `quantine.activations.modules.AttentionSites` that says what it is."""


class CentredKeys(FixedDtypes):
    """The centre of the keys of a block.

    Args:
        first: ``[channels]`` float32, the centre at position 0; channels of one head after another.
        cos, sin: ``[channels]`` float32 each, the wave of `KeyCentre`.
        turns: ``[channels]`` float32, radians from one position to the next.
    """

    tensor_names: Final = ("first", "cos", "sin", "turns")
    fixed_names: tuple[str, ...] = tensor_names

    def __init__(self, first: Tensor, cos: Tensor, sin: Tensor, turns: Tensor) -> None:
        super().__init__()
        for name, tensor in zip(self.tensor_names, (first, cos, sin, turns), strict=True):
            self.register_buffer(name, tensor)

    def by_head(self, dim: int) -> KeyCentre:
        """The same centre, for heads of ``dim`` channels each."""
        tensors = (self.get_buffer(name).view(-1, dim) for name in self.tensor_names)
        first, cos, sin, turns = tensors
        return KeyCentre(first, torch.stack([cos, sin]), turns)

    def of(self, keys: Tensor, positions: Tensor) -> Tensor:
        """What keys ``[batch, heads, tokens, dim]`` at ``positions`` are less by.

        Args:
            positions: ``[batch or 1, tokens]`` int64.

        Returns:
            Float32, broadcastable to the shape of ``keys``.
        """
        return self.by_head(keys.shape[3]).at(positions).transpose(1, 2)

    def check(self, name: str, channels: int) -> None:
        """Refuse tensors, as they were read from files, that are no centre of so many channels.

        Args:
            name: full name of this module, for errors.
            channels: number of channels of all heads of keys.

        Raises:
            FormatError: names the tensor.
        """
        for leaf in self.tensor_names:
            check_tensor(f"{name}.{leaf}", self.get_buffer(leaf), torch.float32, (channels,))

    def extra_repr(self) -> str:
        """One line for ``print(model)``: channels."""
        return f"{len(self.get_buffer('first'))} channels"


def positions_of(context: int, mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """The positions of all keys that queries see, which follow each other.

    Args:
        context: number of keys.
        mask: added to scores, see `quantine.kernels.kv_attention.attend`; or ``None``.
        position_ids: ``[batch or 1, tokens]`` int64, the positions of the queries' tokens, the last
            of which is the last one that it sees.

    Returns:
        ``[batch or 1, context]`` int64, 0 for tokens before the first position.

    Raises:
        FamilyError: the model does not say one position for each token.
    """
    told = _told(position_ids)
    if told.shape[1] == context:
        return told
    slots = torch.arange(context, device=told.device)
    return (slots - _last_seen(context, mask, told) + told[:, -1:]).clamp(min=0)


def check_from_first(context: int, mask: Tensor | None, position_ids: Tensor | None) -> None:
    """Refuse packed keys of other positions than 0, 1 and so on; arguments as `positions_of`.

    Raises:
        FamilyError: as there.
        RuntimeError: positions are others. GPUs of NVIDIA do not wait for the host: there an
            assertion of the device fails.
    """
    told = _told(position_ids)
    fits = (_last_seen(context, mask, told) == told[:, -1:]).all()
    torch._assert_async(
        fits,
        "a packed cache of centred keys holds texts from their first token on, without padding "
        "before them: leave out past_key_values, or the padding",
    )


def _told(position_ids: Tensor | None) -> Tensor:
    if position_ids is None or position_ids.ndim != 2:
        raise FamilyError(
            "the attention of this model is not told one position for each token, by which the "
            "centre of keys turns: leave out -centred (centred_keys)"
        )
    return position_ids


def _last_seen(context: int, mask: Tensor | None, told: Tensor) -> Tensor:
    """Place among the keys of the last one that the last query sees, ``[batch or 1, 1]``."""
    if mask is None:
        return told.new_full((1, 1), context - 1)
    rows = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)[:, 0, -1, :context]
    seen = rows > torch.finfo(mask.dtype).min / 2
    return context - 1 - seen.flip(1).int().argmax(1, keepdim=True)
