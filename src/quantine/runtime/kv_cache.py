"""A cache that keeps keys and values as packed codes of their static grids.

It is transformers' own kind of cache: ``generate`` with beams and batches, cropping and reordering
work as they do with floats. Attention is handed what the codes stand for, one layer at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from quantine.activations.grids import StaticGrid
from quantine.activations.modules import SITES_NAME, AttentionSites
from quantine.errors import FormatError
from quantine.families import family_of
from quantine.families.base import block_list
from quantine.kernels.bits import pack, unpack

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PackedLayer(DynamicLayer):
    """Keys and values of one block, uint8 ``[batch, heads, tokens, bytes]`` each.

    Args:
        key_grid, value_grid: over the channels of all heads, one head after another.
    """

    def __init__(self, key_grid: StaticGrid, value_grid: StaticGrid) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._key_grid, self._value_grid = key_grid, value_grid
        self._dim = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn dtype and width of a head from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._dim = key_states.shape[-1]
        self.keys = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.values = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add states ``[batch, heads, tokens, dim]``.

        Returns:
            What the codes of all tokens stand for, in the dtype of the states.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys = torch.cat([self.keys, packed_states(self._key_grid, key_states)], -2)
        self.values = torch.cat([self.values, packed_states(self._value_grid, value_states)], -2)
        return (
            unpacked_states(self._key_grid, self.keys, self._dim).to(self.dtype),
            unpacked_states(self._value_grid, self.values, self._dim).to(self.dtype),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(0 if kept is None else kept.nbytes for kept in (self.keys, self.values))


def packed_states(grid: StaticGrid, states: Tensor) -> Tensor:
    """``states`` ``[batch, heads, tokens, dim]`` as codes, packed ``[batch, heads, tokens, n]``."""
    batch, heads, tokens, dim = states.shape
    codes = grid.codes(states.transpose(1, 2).flatten(2))
    rows = codes.view(batch, tokens, heads, dim).transpose(1, 2).reshape(-1, dim)
    return pack(rows, grid.bits).view(batch, heads, tokens, -1)


def unpacked_states(grid: StaticGrid, packed: Tensor, dim: int) -> Tensor:
    """What `packed_states` stored, float32 ``[batch, heads, tokens, dim]``."""
    batch, heads, tokens, _ = packed.shape
    codes = unpack(packed.reshape(batch * heads * tokens, -1), grid.bits, dim)
    scale, zero = (value.view(heads, 1, dim) for value in grid.of_channels())
    states: Tensor = codes.view(batch, heads, tokens, dim).float() - zero
    return states.mul_(scale)


def packed_cache(model: PreTrainedModel) -> DynamicCache | None:
    """An empty cache for ``model``; ``None`` where keys and values have no static grids.

    Raises:
        FormatError: some blocks have them and others have not.
    """
    family = family_of(model.config.model_type)
    layers = [_layer(block.get_submodule(family.attention)) for block in block_list(model, family)]
    found = [layer for layer in layers if layer is not None]
    if not found:
        return None
    if len(found) < len(layers):
        raise FormatError("keys and values are rounded in some blocks only: the model is damaged")
    cache = DynamicCache()
    cache.layers.extend(found)
    return cache


def _layer(attention: nn.Module) -> PackedLayer | None:
    sites = getattr(attention, SITES_NAME, None)
    if not isinstance(sites, AttentionSites):
        return None
    key, value = sites.key, sites.value
    if isinstance(key, StaticGrid) and isinstance(value, StaticGrid):
        return PackedLayer(key, value)
    return None
