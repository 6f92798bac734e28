"""Keys less what they differ little from, see `quantine.kernels.kv_attention.key_centre`."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from quantine.activations.stored import check_tensor, check_within
from quantine.core.device import assert_there
from quantine.core.fixed_dtypes import FixedDtypes
from quantine.errors import FamilyError, FormatError
from quantine.kernels.kv_attention.key_centre import KeyCentre

CENTRE_NAME: Final = "centre"
"""Name of the child of `quantine.activations.modules.AttentionSites` that says what it is."""
LOUDEST: Final = 65504.0
"""Largest value of a centre: keys of models in float16 are no larger."""


class CentredKeys(FixedDtypes):
    """The centre of the keys of a block.

    Args:
        first: ``[channels]`` float32, the centre at position 0; channels of one head after another.
        cos, sin: ``[channels]`` float32 each, the wave of `KeyCentre`.
        turns: ``[channels]`` float32, radians from one position to the next, the same in all heads.
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
        return KeyCentre(first, torch.stack([cos, sin]), turns[0])

    def of(self, keys: Tensor, positions: Tensor) -> Tensor:
        """What keys ``[batch, heads, tokens, dim]`` at ``positions`` are less by.

        Args:
            positions: ``[batch or 1, tokens]`` int64.

        Returns:
            Float32, broadcastable to the shape of ``keys``.
        """
        return self.by_head(keys.shape[3]).at(positions).transpose(1, 2)

    def check(self, name: str, heads: int, dim: int) -> None:
        """Refuse tensors, as they were read from files, that are no centre of such keys.

        Args:
            name: full name of this module, for errors.
            heads: number of heads of keys.
            dim: channels of each.

        Raises:
            FormatError: names the tensor.
        """
        for leaf in self.tensor_names:
            tensor, own = self.get_buffer(leaf), f"{name}.{leaf}"
            check_tensor(own, tensor, torch.float32, (heads * dim,))
            least, most = (0.0, math.pi) if leaf == "turns" else (-LOUDEST, LOUDEST)
            check_within(own, tensor, least, most)
        by_head = self.get_buffer("turns").view(heads, dim)
        if not torch.equal(by_head, by_head[:1].expand_as(by_head)):
            raise FormatError(f"{name}.turns differs from head to head: it is damaged")

    def extra_repr(self) -> str:
        """One line for ``print(model)``: channels."""
        return f"{len(self.get_buffer('first'))} channels"


def positions_of(context: int, mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """The positions of all keys that queries see.

    Those of the queries' own tokens are told. Before them, tokens that some query sees count back
    one by one, and padding between them does not count.

    Args:
        context: number of keys.
        mask: added to scores, see `quantine.kernels.kv_attention.attend`; or ``None``.
        position_ids: ``[batch or 1, tokens]`` int64, the positions of the queries' tokens, whose
            keys follow each other. There may be empty room behind them, which no query sees.

    Returns:
        ``[batch or 1, context]`` int64; any number for keys that no query sees.

    Raises:
        FamilyError: the model does not say one position for each token.
    """
    told = _told(position_ids)
    tokens = told.shape[1]
    if tokens == context:
        return told
    slots = torch.arange(context, device=told.device)
    if mask is None:
        seen, start = slots.new_ones(1, context), slots.new_full((1, 1), context - tokens)
    else:
        rows = _seen(context, mask)
        seen, start = rows.any(1).long(), _first_own(rows, tokens)
    # How many tokens follow each one, itself included, before the first query.
    back = (seen * (slots < start)).flip(1).cumsum(1).flip(1)
    ahead = (slots - start).clamp(0, tokens - 1)
    own = told.expand(len(ahead), -1).gather(1, ahead.expand(len(told), -1))
    return torch.where(slots < start, told[:, :1] - back, own).clamp(min=0)


def check_from_first(context: int, mask: Tensor | None, position_ids: Tensor | None) -> None:
    """Refuse packed keys of other positions than 0, 1 and so on; arguments as `positions_of`.

    Raises:
        FamilyError: as there.
        RuntimeError: positions are others. GPUs of NVIDIA do not wait for the host: there an
            assertion of the device fails.
    """
    told = _told(position_ids)
    places = torch.arange(told.shape[1], device=told.device)
    if mask is None:
        fits = (told == places + (context - told.shape[1])).all()
    else:
        rows = _seen(context, mask)
        start = _first_own(rows, len(places))
        places = start + places
        # Padding among the queries does not see its own key.
        own = places.clamp(max=context - 1).unsqueeze(2)
        real = rows.expand(-1, own.shape[1], -1).gather(2, own).squeeze(2)
        begins = (start[:, 0] > 0) | rows[..., 0].any(1)
        fits = ((told == places) | ~real).all() & begins.all()
    assert_there(
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


def _seen(context: int, mask: Tensor) -> Tensor:
    """Which keys each query sees, ``[batch or 1, tokens, context]`` bool."""
    rows = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)[:, 0, :, :context]
    return rows > torch.finfo(mask.dtype).min / 2


def _first_own(rows: Tensor, tokens: int) -> Tensor:
    """Place of the first query's own key, ``[batch or 1, 1]`` int64.

    A query sees its own key last, unless it is padding: then it sees less, or nothing.

    Args:
        rows: as `_seen` gives them; a single one is that of the last query.
        tokens: number of queries.
    """
    last = rows.shape[2] - 1 - rows.flip(2).int().argmax(2)
    begin = last - torch.arange(tokens, device=rows.device)[-rows.shape[1] :]
    return begin.where(rows.any(2), 0).amax(1, keepdim=True).clamp(min=0)
