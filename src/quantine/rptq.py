"""RPTQ (arXiv 2304.01089): a block's channels in clusters of alike ranges, and grids for them.

Everything is found with the block's float weights, on what the quantized blocks before it put out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from quantine.activations.grids import FEEDBACK, LABELS, StaticGrid, faithful
from quantine.activations.install import (
    ATTENDED,
    Place,
    add_grids,
    add_norms,
    add_sites,
    link_of,
    places,
)
from quantine.activations.reorder import reorder
from quantine.calibrate.outputs import token_change
from quantine.calibrate.sequential import Sequential, set_tensor
from quantine.core.activation import ActivationSpec
from quantine.core.cluster import Clusters, cluster_channels, order_within_heads
from quantine.core.feedback import feedback_of
from quantine.core.observe import MinMax
from quantine.core.ranges import covering, search
from quantine.families.base import Family, Link, is_transposed
from quantine.formats.checkpoint import Checkpoint
from quantine.matrix import as_stored

SEARCH_TOKENS: Final = 2048
"""Calibration tokens that rank grids: each is tried on the whole block, which takes the time."""
FED_BELOW: Final = 8
"""Bits from which on rounding channels in turn is not worth its time."""

Ranges = Mapping[str, MinMax]
"""What places showed, by `Place.path`."""
Fitted = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
"""Scales and zero points ``[clusters]`` float32, and perhaps the feedback of `StaticGrid`."""


@dataclass(frozen=True)
class Heads:
    """Heads of attention.

    Attributes:
        queries, keys: heads of queries; of keys and values.
    """

    queries: int
    keys: int

    @classmethod
    def of(cls, config: Any, family: Family) -> Heads:
        """Those of a model with this configuration of transformers."""
        queries = int(config.num_attention_heads)
        if any(link.rows == "interleaved" for link in family.links):
            return cls(queries, queries)  # one matrix has query, key and value of each head
        return cls(queries, int(getattr(config, "num_key_value_heads", None) or queries))

    @property
    def copies(self) -> int:
        """Heads of queries that share keys and values."""
        return self.queries // self.keys


class Reordering:
    """The clusters of one block.

    Args:
        family: of the model.
        heads: of the model.
        spec: what is asked of activations.
        ranges: of all places in the block.
        held_out: first samples that a search compares grids on: clusters and candidates do not
            know them, so that what is beyond their ranges counts.
    """

    def __init__(
        self, family: Family, heads: Heads, spec: ActivationSpec, ranges: Ranges, held_out: int = 0
    ) -> None:
        self._family, self._heads, self._spec, self._ranges = family, heads, spec, ranges
        self._held_out = held_out
        self._clusters = {link.kind: self._clustered(link) for link in family.links}

    def apply(self, block: nn.Module) -> None:
        """Rewrite ``block``, which computes the same afterwards."""
        if self._spec.reorders:
            for link in self._family.links:
                heads = self._heads.keys if link.per_head else 1
                reorder(block, link, self._clusters[link.kind].order, heads)

    def clusters_at(self, place: Place) -> Clusters:
        """The clusters of a place's channels, as these are now ordered."""
        link = link_of(self._family, place.kind)
        own = self._clusters[place.kind]
        ordered = own if link.fold == "attention" or not self._spec.reorders else own.ordered()
        wide = place.site in {"query", "attention"}
        # A tensor's one grid is not copied for each head.
        copies = self._heads.copies if wide else 1
        if not self._spec.reorders:
            return Clusters(own.labels.repeat(copies))
        return ordered.shared(self._heads.keys, copies) if copies > 1 else ordered

    def input_clusters(self, path: str) -> Clusters:
        """The clusters of the inputs of the matrix at ``path``."""
        return self.clusters_at(next(p for p in places(self._family) if p.path == path))

    def maps(self) -> dict[str, Tensor]:
        """What clusters were made of, by reorder, for pictures; empty where nothing is reordered.

        ``[channels, features + 1]`` float32, channels as the model has them: the largest and the
        smallest value of a channel in what was not held out (of queries, then of keys, for R2), and
        the cluster.
        """
        links = self._family.links if self._spec.reorders else ()
        return {
            link.kind: torch.column_stack([self._points(link), self._clusters[link.kind].labels])
            for link in links
        }

    def grid(self, place: Place, bits: int) -> StaticGrid:
        """The static grid of a place, before any search."""
        labels = self.clusters_at(place).labels
        running = self._spec.range == "running"
        ends = self.ranges_at(place).of_clusters(labels, running)
        fit = faithful if running else covering
        return StaticGrid(bits, *fit(*ends, bits), labels.to(LABELS))

    def rounded(self, block: nn.Module) -> list[list[Place]]:
        """The places of ``block`` with static grids; those that read the same share one."""
        shared: dict[tuple[str, str], list[Place]] = {}
        modules = dict(block.named_modules())
        for place in places(self._family):
            if isinstance(modules.get(place.grid), StaticGrid):
                shared.setdefault((place.site, place.kind), []).append(place)
        return list(shared.values())

    def candidates(self, block: nn.Module, place: Place, bits: int, final: bool) -> list[Fitted]:
        """Scales and zero points that a search chooses from; ``block`` is reordered.

        Args:
            final: know all samples.
        """
        labels, seen = self.clusters_at(place).labels, self._shown(place, final)
        importance = self._importance(block, place, final)
        found: list[Fitted] = [
            covering(*seen.of_clusters(labels, running=False), bits),
            faithful(*seen.of_clusters(labels, running=True), bits),
            search(seen, importance, labels, bits),
        ]
        if place.site in ATTENDED and bits < FED_BELOW:
            feedback = feedback_of(self._moments(block, place, final))
            found += [(scale, zero, feedback) for scale, zero, *_ in found]
        return found

    def _shown(self, place: Place, final: bool) -> MinMax:
        seen = self.ranges_at(place)
        return seen if final else seen.after(self._held_out)

    def _moments(self, block: nn.Module, place: Place, final: bool) -> Tensor:
        """Second moments of what a head's channels are multiplied by in attention.

        Returns:
            ``[heads, dim, dim]`` float32, by heads of the place.
        """
        keys, copies = self._heads.keys, self._heads.copies
        if place.site == "value":
            (path,) = link_of(self._family, place.kind).consumers
            rows = matrix_of(block.get_submodule(path))
        else:
            rows = self._shown(self._met(place), final).rows
        of_queries = place.site != "query"  # or of columns that stand for a query's head
        shape = (len(rows), keys, copies if of_queries else 1, -1)
        states = rows.reshape(shape).permute(1, 2, 0, 3).flatten(1, 2)
        moments = states.transpose(1, 2) @ states
        return moments if of_queries else moments.repeat_interleave(copies, 0)

    def _met(self, place: Place) -> Place:
        """The keys that queries meet, or the other way round."""
        other = "key" if place.site == "query" else "query"
        path = f"{place.path.rpartition('.')[0]}.{other}"
        return next(found for found in places(self._family) if found.path == path)

    def _importance(self, block: nn.Module, place: Place, final: bool) -> Tensor:
        """How much the squared error of each channel at a place costs what reads it.

        ``[channels]`` float32. For the input of matrices, the squares of a column: the expected
        cost where errors of channels do not depend on each other. A query's channel meets the
        key's, a value's goes through attention to its column of the output projection.
        """
        if place.site in {"query", "key"}:
            strength = self._shown(self._met(place), final).rows.square().mean(0)
        else:
            strength = torch.stack(
                [
                    matrix_of(block.get_submodule(path)).square().sum(0)
                    for path in link_of(self._family, place.kind).consumers
                ]
            ).sum(0)
        return self._for_heads(strength, len(self.ranges_at(place).rows[0]))

    def _for_heads(self, strength: Tensor, channels: int) -> Tensor:
        """``strength`` of channels, for as many as there are in heads of another number."""
        if channels == len(strength):
            return strength
        if channels < len(strength):
            return strength.view(self._heads.keys, self._heads.copies, -1).sum(1).flatten()
        width = len(strength) // self._heads.keys
        return strength.view(-1, width).repeat_interleave(self._heads.copies, 0).flatten()

    def ranges_at(self, place: Place) -> MinMax:
        """What a place showed, channels in the order of now."""
        found = self._ranges[place.path]
        link = link_of(self._family, place.kind)
        if link.fold == "attention" or not self._spec.reorders:
            return found
        order = self._clusters[place.kind].order
        heads = self._heads.keys if link.per_head else 1
        copies = found.lows.shape[1] // len(order)
        return found.ordered(order_within_heads(order, heads, copies))

    def _clustered(self, link: Link) -> Clusters:
        count = self._spec.clusters_of(link.kind)
        points = self._points(link)
        if not self._spec.reorders:
            return Clusters(torch.zeros(len(points), dtype=torch.int64))
        return cluster_channels(points, count, self._heads.keys if link.per_head else 1)

    def _points(self, link: Link) -> Tensor:
        """Ends of the ranges that a cluster's channels have in common, ``[channels, features]``."""
        seen = [p for p in places(self._family) if p.kind == link.kind]
        read = [p for p in seen if p.site not in ATTENDED][:1] or seen
        features: list[Tensor] = []
        for place in read:
            low, high = self._ranges[place.path].after(self._held_out).of_channels()
            if place.site in {"query", "attention"}:
                shape = (self._heads.keys, self._heads.copies, -1)
                low, high = low.view(shape).amin(1).flatten(), high.view(shape).amax(1).flatten()
            features += [high, low]
        return torch.stack(features, 1)


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of ``module`` as ``[out, in]``."""
    weight = module.get_parameter("weight").detach()
    return weight.T if is_transposed(module) else weight


def prepare_block(
    sequential: Sequential,
    index: int,
    block: nn.Module,
    family: Family,
    heads: Heads,
    spec: ActivationSpec,
) -> Reordering:
    """Reorder the channels of block ``index``, and let it round its activations."""
    add_sites(block, family, spec)
    found = sequential.ranges(index, [place.path for place in places(family)])
    searched = spec.range == "search" and spec.granularity != "token"
    held_out = ranking_samples(sequential) if searched else 0
    reordering = Reordering(family, heads, spec, found, held_out)
    reordering.apply(block)
    before = outputs(sequential, index) if searched else []
    add_grids(block, family, spec, reordering.grid)
    if searched:
        _search(sequential, index, block, reordering, before)
    return reordering


def ranking_batches(sequential: Sequential) -> int:
    """How many batches, the first ones, rank grids: half of them, but one at least."""
    tokens = sequential.hidden[0].shape[:2].numel()
    return max(1, min(-(-SEARCH_TOKENS // tokens), len(sequential.hidden) // 2))


def ranking_samples(sequential: Sequential) -> int:
    """The samples of `ranking_batches` that can be held out: none, where there are no others."""
    batches = ranking_batches(sequential)
    return batches * len(sequential.hidden[0]) if batches < len(sequential.hidden) else 0


def outputs(sequential: Sequential, index: int) -> list[Tensor]:
    """What block ``index`` makes of some calibration tokens, as it is now."""
    with torch.no_grad():
        return [
            sequential.run(index, sequential.hidden[batch])
            for batch in range(ranking_batches(sequential))
        ]


def _search(
    sequential: Sequential,
    index: int,
    block: nn.Module,
    reordering: Reordering,
    before: Sequence[Tensor],
) -> None:
    """Give one site after another the grid that changes the block's output least."""
    for shared in reordering.rounded(block):
        grids = [block.get_submodule(place.grid) for place in shared]
        first = grids[0]
        assert isinstance(first, StaticGrid)
        changes = []
        for candidate in reordering.candidates(block, shared[0], first.bits, final=False):
            _refit(grids, candidate)
            changes.append(token_change(before, outputs(sequential, index)))
        best = changes.index(min(changes))
        _refit(grids, reordering.candidates(block, shared[0], first.bits, final=True)[best])


def _refit(grids: Sequence[nn.Module], fitted: Fitted) -> None:
    for grid in grids:
        assert isinstance(grid, StaticGrid)
        grid.refit(*fitted)


def restore_block(
    model: nn.Module,
    block: nn.Module,
    path: str,
    family: Family,
    spec: ActivationSpec,
    tensors: Mapping[str, Tensor],
) -> None:
    """Give ``block``, found at ``path``, the structure and the floats that a run had stored."""

    def grid(place: Place, bits: int) -> StaticGrid:
        own = f"{path}.{place.grid}"
        scale, zero, labels = (tensors[f"{own}.{name}"] for name in StaticGrid.tensor_names)
        return StaticGrid(bits, scale, zero, labels, tensors.get(f"{own}.{FEEDBACK}"))

    add_sites(block, family, spec)
    add_norms(block, family, spec, lambda norm: tensors[f"{path}.{norm}.order"])
    add_grids(block, family, spec, grid)
    for name, present in block.state_dict(prefix=f"{path}.").items():
        if name in tensors:
            set_tensor(model, name, tensors[name].to(present.dtype))


def float_tensors(
    block: nn.Module, path: str, checkpoint: Checkpoint, packed: Collection[str]
) -> dict[str, Tensor]:
    """What the output holds of a rewritten block besides packed matrices, by full name.

    Args:
        packed: names of the modules whose weights are packed.
    """
    found = {}
    for name, tensor in block.state_dict(prefix=f"{path}.").items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in packed:
            continue
        source = name if name in checkpoint else f"{owner.removesuffix('.norm')}.{leaf}"
        dtype = checkpoint.dtype(source) if source in checkpoint else tensor.dtype
        found[name] = as_stored(name, tensor.to(dtype).contiguous())
    return found
