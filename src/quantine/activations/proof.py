"""Proofs on a small model that a reorder leaves a block as it is, and that half of it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from quantine.activations.modules import SITES_NAME, AttentionSites
from quantine.activations.reorder import permute_inputs, reorder
from quantine.core.permute import order_within_heads
from quantine.errors import FamilyError
from quantine.families.derivation.one_by_one import BlockCall
from quantine.families.family import Link
from quantine.families.heads import Heads
from quantine.families.layers import is_transposed

SAME: Final = 1e-5
"""Largest difference of outputs that sums in float32 explain, as a share of the largest output."""
OTHER: Final = 1e-4
"""Least difference, as the same share, that shows that a reorder was one."""
CONTAINERS: Final = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""Modules that are no more than their children."""
READ: Final = ("query", "key", "value")
"""What attention reads, as attributes of `AttentionSites`."""


@dataclass(frozen=True)
class Proof:
    """What is tried on copies of one block of a small model.

    Attributes:
        call: a call of the block, with random weights and a random text.
        heads: numbers of attention heads.
        width: number of channels of a head.
    """

    call: BlockCall
    heads: Heads
    width: int

    def holds(self, link: Link) -> bool:
        """Whether a reorder along ``link`` changes nothing, and half of it something.

        Halves are the producers' part and the consumers'; where there are no consumers, they are
        the parts of the single producers.
        """
        if link.consumers:
            halves = [replace(link, consumers=()), replace(link, producers=())]
        else:
            halves = [replace(link, producers=(one,)) for one in link.producers]
        try:
            order = self._order(link)

            def change(of: Link) -> float:
                return self._changed(lambda block: self._reorder(block, of, order))

            return change(link) <= SAME and all(change(half) >= OTHER for half in halves)
        # What blocks raise whose modules take no such order.
        except (AttributeError, FamilyError, LookupError, RuntimeError, TypeError, ValueError):
            return False

    def attention(self) -> str:
        """Path of the one module of the block whose attention can round what it reads, or empty.

        The model has the attention function of `quantine.activations.attention`. The heads are
        those that the configuration says.
        """
        block, seen = copy.deepcopy(self.call.block), list[tuple[str, str, int]]()
        for path, module in list(block.named_modules()):
            if any(module.children()) and not isinstance(module, CONTAINERS):
                sites = AttentionSites()
                for site in READ:
                    setattr(sites, site, _Noted(seen, path, site))
                setattr(module, SITES_NAME, sites)
        replace(self.call, block=block).output()
        counts = (self.heads.queries, self.heads.keys, self.heads.keys)
        paths = {path for path, _, _ in seen}
        wanted = [(site, count * self.width) for site, count in zip(READ, counts, strict=True)]
        found = sorted((READ.index(site), width) for _, site, width in seen)
        if len(paths) != 1 or [(READ[site], width) for site, width in found] != wanted:
            return ""
        return paths.pop()

    def attends(self, path: str, values: Link | None) -> bool:
        """Whether attention computes with what its sites put out, head by head.

        Queries and keys in another order change nothing together, but either alone does. So do
        values, unless the matrices that read them expect the order.

        Args:
            path: of the attention module, see `attention`.
            values: the link of the values, where there is one.
        """
        keys = random_order(self.heads.keys * self.width, self.heads.keys)
        queries = order_within_heads(keys, self.heads.keys, self.heads.copies)
        readers = () if values is None else values.consumers

        def change(readers: tuple[str, ...] = (), **orders: Tensor) -> float:
            def apply(block: nn.Module) -> None:
                sites = AttentionSites()
                for site, order in orders.items():
                    setattr(sites, site, _Permuted(order))
                setattr(block.get_submodule(path), SITES_NAME, sites)
                for reader in readers:
                    permute_inputs(block.get_submodule(reader), keys, self.heads.keys)

            return self._changed(apply)

        return (
            change(query=queries, key=keys) <= SAME
            and change(query=queries) >= OTHER
            and change(key=keys) >= OTHER
            and change(value=keys) >= OTHER
            and (not readers or change(readers, value=keys) <= SAME)
        )

    def rewrite(self, block: nn.Module, link: Link) -> None:
        """Reorder ``block``, which may be that of `call`, along ``link``, at random."""
        self._reorder(block, link, self._order(link))

    def _reorder(self, block: nn.Module, link: Link, order: Tensor) -> None:
        reorder(block, link, order, self.heads.keys if link.per_head else 1)

    def _order(self, link: Link) -> Tensor:
        channels = self.heads.keys * self.width
        if link.consumers:
            reader = self.call.block.get_submodule(link.consumers[0])
            weight, axis = reader.get_parameter("weight"), 0 if is_transposed(reader) else 1
            channels = int(weight.shape[axis]) // (self.heads.copies if link.per_head else 1)
        return random_order(channels, self.heads.keys if link.per_head else 1)

    def _changed(self, change: Callable[[nn.Module], None]) -> float:
        """The largest difference of outputs that ``change`` makes, as a share of the largest."""
        block = copy.deepcopy(self.call.block)
        change(block)
        expected, found = self.call.output(), replace(self.call, block=block).output()
        return float((found - expected).abs().max() / expected.abs().max())


def random_order(channels: int, heads: int) -> Tensor:
    """A random order of channels ``[channels]`` int64 that keeps them in their heads."""
    generator = torch.Generator("cpu").manual_seed(channels)
    width = channels // heads
    return torch.cat(
        [
            torch.randperm(width, generator=generator, dtype=torch.int64, device="cpu")
            + head * width
            for head in range(heads)
        ]
    )


class _Noted(nn.Module):
    """Notes in ``seen`` that a site read, and how many channels."""

    def __init__(self, seen: list[tuple[str, str, int]], path: str, site: str) -> None:
        super().__init__()
        self._seen, self._path, self._site = seen, path, site

    def forward(self, x: Tensor) -> Tensor:
        self._seen.append((self._path, self._site, x.shape[-1]))
        return x


class _Permuted(nn.Module):
    """Puts the channels of ``[..., channels]`` into the order ``[channels]`` int64."""

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self._order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self._order)
