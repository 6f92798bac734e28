"""A KV cache that keeps keys and values as packed codes of their static grids.

It extends transformers' cache: ``generate`` with beams and batches, cropping and reordering work as
they do with floats. quantine's attention reads the codes; any other attention function gets decoded
floats, of one layer at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from quantine.activations.grids import StaticGrid
from quantine.activations.modules import SITES_NAME, AttentionSites
from quantine.core.overrides import is_overridden
from quantine.errors import FamilyError
from quantine.families import described_family
from quantine.families.layers import block_list
from quantine.kernels.bits.reference import packed_bytes
from quantine.kernels.kv_attention.packed_states import PackedStates
from quantine.kernels.kv_attention.packing import pack_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel


BLOCK: Final = 64
"""Number of tokens by which the allocated memory of a layer grows; less than this is unused."""


class PackedLayer(DynamicLayer):
    """The keys and values of one block, packed: uint8 ``[batch, heads, tokens, bytes]`` each.

    Both are views of the used part of a larger allocation. Where transformers replaces them by
    other tensors (reordering or selecting samples), the next update makes a new allocation.

    Args:
        key_grid, value_grid: grids of keys and of values, over the channels of all heads, one head
            after another.
    """

    def __init__(self, key_grid: StaticGrid, value_grid: StaticGrid) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._grids = key_grid, value_grid
        self._rooms: list[Tensor] = []
        self._channels: list[tuple[Tensor, Tensor]] = []  # scale and zero, [heads, dim]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Set up empty codes; called by the first `update`.

        Args:
            key_states, value_states: ``[batch, heads, tokens, dim]``, of which only shape, dtype
                and device matter.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, dim = key_states.shape
        self._channels = []
        self._rooms = []
        for grid in self._grids:
            scale, zero = grid.of_channels()
            self._channels.append((scale.view(heads, dim), zero.view(heads, dim)))
            nothing = (batch, heads, 0, packed_bytes(dim, grid.bits))
            self._rooms.append(torch.empty(nothing, dtype=torch.uint8, device=self.device))
        self.keys, self.values = self._rooms
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Round and append the keys and values of new tokens.

        Args:
            key_states, value_states: ``[batch, heads, tokens, dim]`` of any float dtype.
            args, kwargs: further arguments of transformers, not used.

        Returns:
            Keys and values of all tokens so far, as `PackedStates`. They share memory with the
            cache: cropping it and then adding other tokens changes them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys = self._added(0, self.keys, key_states)
        self.values = self._added(1, self.values, value_states)
        return self._seen(0, self.keys), self._seen(1, self.values)

    def _added(self, which: int, used: Tensor, states: Tensor) -> Tensor:
        before = used.shape[2]
        after = before + states.shape[2]
        room = self._rooms[which]
        if room.data_ptr() != used.data_ptr() or room.shape[2] < after or len(room) != len(used):
            shape = (*used.shape[:2], -(-after // BLOCK) * BLOCK, used.shape[3])
            room = self._rooms[which] = used.new_empty(shape)
            room[:, :, :before] = used
        bits, (scale, zero) = self._grids[which].bits, self._channels[which]
        added = room[:, :, before:after]
        pack_states(states, bits, scale, zero, added, self._grids[which].fed())
        return room[:, :, :after]

    def _seen(self, which: int, used: Tensor) -> PackedStates:
        bits, (scale, zero) = self._grids[which].bits, self._channels[which]
        return PackedStates(used, bits, scale, zero, self.dtype)

    def reset(self) -> None:
        """Forget all tokens and free their memory."""
        super().reset()
        self._rooms = []

    @property
    def nbytes(self) -> int:
        """Bytes of memory of keys and values, including what is allocated for the next tokens."""
        held = [states for states in (self.keys, self.values, *self._rooms) if states is not None]
        storages = {states.data_ptr(): states.untyped_storage() for states in held}
        return sum(storage.nbytes() for storage in storages.values())

    @property
    def statistics_nbytes(self) -> int:
        """Bytes of the scales and zero points of all channels, which do not grow with tokens."""
        return sum(values.nbytes for pair in self._channels for values in pair)


def packed_cache(model: PreTrainedModel) -> DynamicCache | None:
    """An empty packed cache for ``model``, or ``None`` where not all of it can be packed.

    Every block must be found where its family has it, and must round keys and values with static
    grids that compute what their class says. Without the cache, attention rounds them.
    """
    family = described_family(model.config.model_type)
    try:
        modules = [block.get_submodule(family.attention) for block in block_list(model, family)]
    except (AttributeError, FamilyError):  # somebody put something around blocks or their list
        return None
    cache = DynamicCache()
    for index, attention in enumerate(modules):
        layer = _layer(attention)
        if layer is None or getattr(attention, "layer_idx", None) != index:
            return None
        cache.layers.append(layer)
    return cache


def _layer(attention: nn.Module) -> PackedLayer | None:
    sites = getattr(attention, SITES_NAME, None)
    if not isinstance(sites, AttentionSites):
        return None
    key, value = sites.key, sites.value
    for grid in (key, value):
        if type(grid) is not StaticGrid or is_overridden(grid):
            return None
    assert isinstance(key, StaticGrid)
    assert isinstance(value, StaticGrid)
    return PackedLayer(key, value)
