"""KV caches that keep keys and values as packed codes of their static grids.

They extend transformers' caches: one grows, and ``generate`` with beams and batches, cropping and
reordering work as they do with floats; the other's memory never moves, so that a step can be
recorded and repeated. quantine's attention reads the codes; any other attention function gets
decoded floats, of one layer at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from quantine.activations.centred_keys import CentredKeys
from quantine.activations.grids import StaticGrid
from quantine.activations.modules import SITES_NAME, AttentionSites
from quantine.core.device import assert_there
from quantine.core.overrides import is_overridden
from quantine.errors import FamilyError
from quantine.families import described_family
from quantine.families.layers import block_list
from quantine.kernels.kv_attention.key_centre import KeyCentre
from quantine.kernels.kv_attention.state_grid import StateGrid

if TYPE_CHECKING:
    from transformers import PreTrainedModel


BLOCK: Final = 64
"""Number of tokens by which the allocated memory of a layer grows; less than this is unused."""


class Grids(NamedTuple):
    """How the keys and values of a block are rounded.

    Attributes:
        key, value: grids over the channels of all heads, one head after another.
        centre: what keys are less by before; ``None`` for nothing.
    """

    key: StaticGrid
    value: StaticGrid
    centre: CentredKeys | None = None

    def by_head(self, dim: int, centres: list[KeyCentre]) -> list[StateGrid]:
        """The grids of keys and values for heads of ``dim`` channels.

        Args:
            centres: those of other blocks of the cache, whose tables are shared; gets this one's
                if it has a table of its own.
        """
        key, value = self.key.by_head(dim), self.value.by_head(dim)
        if self.centre is None:
            return [key, value]
        centre = self.centre.by_head(dim)
        if not any(centre.share(other) for other in centres):
            centres.append(centre)
        return [key._replace(centre=centre), value]


def _centred(grid: StateGrid, states: Tensor, start: int | Tensor) -> Tensor:
    """New keys or values, of positions from ``start`` on, less their centre if they have one."""
    if grid.centre is None:
        return states
    positions = torch.arange(states.shape[2], device=states.device) + start
    return states.float() - grid.centre.at(positions).transpose(0, 1)


class PackedLayer(DynamicLayer):
    """The keys and values of one block, packed: uint8 ``[batch, heads, tokens, bytes]`` each.

    Both are views of the used part of a larger allocation. Where transformers replaces them by
    other tensors (reordering or selecting samples), the next update makes a new allocation.

    Args:
        grids: how they are rounded.
        centres: shared by all layers of a cache, see `Grids.by_head`.
    """

    def __init__(self, grids: Grids, centres: list[KeyCentre] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._grids, self._centres = grids, [] if centres is None else centres
        self._rooms: list[Tensor] = []
        self._by_head: list[StateGrid] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Set up empty codes; called by the first `update`.

        Args:
            key_states, value_states: ``[batch, heads, tokens, dim]``, of which only shape, dtype
                and device matter.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, dim = key_states.shape
        self._by_head = self._grids.by_head(dim, self._centres)
        self._rooms = [
            torch.empty(batch, heads, 0, grid.row, dtype=torch.uint8, device=self.device)
            for grid in self._by_head
        ]
        self.keys, self.values = self._rooms
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
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
        key, value = self._by_head
        return key.states(self.keys, self.dtype), value.states(self.values, self.dtype)

    def _added(self, which: int, used: Tensor, states: Tensor) -> Tensor:
        before = used.shape[2]
        after = before + states.shape[2]
        room = self._rooms[which]
        if room.data_ptr() != used.data_ptr() or room.shape[2] < after or len(room) != len(used):
            shape = (*used.shape[:2], -(-after // BLOCK) * BLOCK, used.shape[3])
            room = self._rooms[which] = used.new_empty(shape)
            room[:, :, :before] = used
        grid = self._by_head[which]
        grid.pack(_centred(grid, states, before), room[:, :, before:after])
        return room[:, :, :after]

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
        """Bytes of scales, zero points and the centre of keys, which do not grow with tokens."""
        centre = self._by_head[0].centre if self._by_head else None
        grids = sum(grid.scale.nbytes + grid.zero.nbytes for grid in self._by_head)
        return grids if centre is None else grids + centre.nbytes


class StaticPackedLayer(StaticLayer):
    """Packed keys and values of one block in room for all tokens from the beginning.

    They are uint8 ``[batch, heads, room, bytes]`` each. How many tokens there are is a tensor: new
    ones are written behind them, and a mask hides what is not filled, without the host reading the
    number.

    Args:
        grids, centres: as for `PackedLayer`.
        room: number of tokens that it can hold.
        counts: whether the device checks that new tokens have room; one layer of a cache is enough.
    """

    def __init__(
        self,
        grids: Grids,
        room: int,
        counts: bool = True,
        centres: list[KeyCentre] | None = None,
    ) -> None:
        super().__init__(max_cache_len=room)
        self._grids, self._centres = grids, [] if centres is None else centres
        self._counts = counts
        self._by_head: list[StateGrid] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the codes; called by the first `update`.

        Args:
            key_states, value_states: ``[batch, heads, tokens, dim]``, of which only shape, dtype
                and device matter.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads, _, dim = key_states.shape
        self.k_head_dim = self.v_head_dim = dim
        self._by_head = self._grids.by_head(dim, self._centres)
        shape = (self.batch_size, self.num_heads, self.max_cache_len)
        rooms = [
            torch.zeros(*shape, grid.row, dtype=torch.uint8, device=self.device)
            for grid in self._by_head
        ]
        self.keys, self.values = rooms
        self.cumulative_length = self.cumulative_length.to(self.device)
        for kept in (*rooms, self.cumulative_length):
            torch._dynamo.mark_static_address(kept)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Round the keys and values of new tokens, and write them behind those that are there.

        Args:
            key_states, value_states: ``[batch, heads, tokens, dim]`` of any float dtype.
            args, kwargs: further arguments of transformers, not used.

        Returns:
            Keys and values of the whole room, as `PackedStates`, or as `RecordedStates` in a graph
            that PyTorch compiles. What is not filled stands for some floats that are finite.

        Raises:
            ValueError: there is no room for them. On a GPU of NVIDIA, where the host waits for
                nothing, they are not written, and an assertion of the device fails, as it does
                when a recorded step is repeated: CUDA raises it the next time that values are read.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        key = self._added(0, self.keys, key_states)
        value = self._added(1, self.values, value_states)
        self.cumulative_length.add_(key_states.shape[2])
        if self._counts:
            there_is_room = self.cumulative_length <= self.max_cache_len
            assert_there(there_is_room, f"more tokens than room for {self.max_cache_len}")
        return key, value

    def _added(self, which: int, room: Tensor, states: Tensor) -> Any:
        grid = self._by_head[which]
        states = _centred(grid, states, self.cumulative_length)
        grid.pack(states, room, self.cumulative_length)
        return grid.states(room, self.dtype)


def packed_cache(model: PreTrainedModel) -> DynamicCache | None:
    """An empty packed cache for ``model``, or ``None`` where `_grids_of` finds no grids for it."""
    grids = _grids_of(model)
    if grids is None:
        return None
    cache, centres = DynamicCache(), list[KeyCentre]()
    cache.layers.extend(PackedLayer(own, centres) for own in grids)
    return cache


def static_cache(model: PreTrainedModel, room: int) -> Cache:
    """An empty cache of ``model`` with room for so many tokens, packed if all of it can be.

    Layers of sliding windows have as much room as others: what lies outside of them is masked.
    """
    grids, count = _grids_of(model), model.config.get_text_config().num_hidden_layers
    if grids is None:
        return Cache(layers=[StaticLayer(max_cache_len=room) for _ in range(count)])
    centres: list[KeyCentre] = []
    return Cache(
        layers=[
            StaticPackedLayer(own, room, counts=number == 0, centres=centres)
            for number, own in enumerate(grids)
        ]
    )


def has_centred_keys(model: PreTrainedModel) -> bool:
    """Whether a packed cache of ``model`` holds texts from their first token on only."""
    return any(grids.centre is not None for grids in _grids_of(model) or ())


def _grids_of(model: PreTrainedModel) -> list[Grids] | None:
    """The grids of keys and of values of each block, or ``None`` where not all can be packed.

    Every block must be found where its family has it, and must round keys and values with static
    grids that compute what their class says. Without a packed cache, attention rounds them.
    """
    try:
        family = described_family(model.config.model_type)
        modules = [block.get_submodule(family.attention) for block in block_list(model, family)]
    except (AttributeError, FamilyError):  # not known, or somebody put something around blocks
        return None
    found = []
    for index, attention in enumerate(modules):
        grids = _grids(attention)
        if grids is None or getattr(attention, "layer_idx", None) != index:
            return None
        found.append(grids)
    return found


def _grids(attention: nn.Module) -> Grids | None:
    sites = getattr(attention, SITES_NAME, None)
    if not isinstance(sites, AttentionSites):
        return None
    key, value = sites.key, sites.value
    for grid in (key, value):
        if type(grid) is not StaticGrid or is_overridden(grid):
            return None
    assert isinstance(key, StaticGrid)
    assert isinstance(value, StaticGrid)
    return Grids(key, value, sites.centre)
