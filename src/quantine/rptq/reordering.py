"""The clusters of one block's channels, and calibration ranges in the order of the clusters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quantine.activations.grids import LABELS, StaticGrid
from quantine.activations.install import (
    ATTENDED,
    RoundingPoint,
    link_of,
    read_links,
    rounding_points,
    value_link,
)
from quantine.activations.reorder import order_of_outputs, reorder
from quantine.activations.rotated_inputs import RotatedGrid
from quantine.activations.rotated_values import turns_of_outputs
from quantine.core.activation_spec import FINE_BITS, SITES_WITH_FACTORS, ActivationSpec
from quantine.core.fit_range import (
    fit_activations,
    fit_activations_around_zero,
    fit_activations_as_published,
)
from quantine.core.permute import order_within_heads
from quantine.families.family import Family, Link
from quantine.families.heads import Heads
from quantine.rptq.clusters import Clusters, cluster_channels
from quantine.rptq.ranges import widened
from quantine.statistics.channel_ranges import ChannelRanges

Ranges = Mapping[str, ChannelRanges]
"""Calibration ranges of all points in a block, by `RoundingPoint.path`."""


class Reordering:
    """The clusters of the channels of one block.

    Args:
        family: the model's architecture, as the block has it.
        heads: the model's numbers of heads.
        spec: bits, clusters and ranges of activations.
        ranges: calibration ranges of all points in the block.
        held_out: number of calibration samples, from the first, that clusters are made without: a
            search compares grids on them, so that values beyond the fitted ranges count as they
            would in new text.
        smoothings: what inputs are divided by before they are rotated, by `RoundingPoint.path`;
            ``ranges`` are those of rotated ones. These are centred by the mean over all samples.
        rotates_values: whether the block's values were rotated.
    """

    def __init__(
        self,
        family: Family,
        heads: Heads,
        spec: ActivationSpec,
        ranges: Ranges,
        held_out: int = 0,
        smoothings: Mapping[str, Tensor] | None = None,
        rotates_values: bool = False,
    ) -> None:
        self.family, self.heads, self.held_out = family, heads, held_out
        self._smoothings, self._rotates_values = smoothings or {}, rotates_values
        self._spec = spec
        self._centres = {path: ranges[path].rows.mean(0) for path in self._smoothings}
        self._ranges = {
            path: seen.less(self._centres[path]) if path in self._centres else seen
            for path, seen in ranges.items()
        }
        self._clusters = {link.kind: self._clustered(link) for link in read_links(family)}
        self._values = self._clustered_values()

    def apply(self, block: nn.Module) -> None:
        """Reorder the channels of ``block`` in place; it computes the same afterwards."""
        if self._spec.reorders:
            for link in read_links(self.family):
                heads = self.heads.keys if link.per_head else 1
                reorder(block, link, self._clusters[link.kind].order, heads)

    def orders_of_outputs(self, block: nn.Module) -> dict[str, Tensor]:
        """Where `apply` puts the outputs of matrices, by path in ``block``; others' stay.

        ``[out]`` int64: place ``j`` gets output ``order[j]``.
        """
        found: dict[str, Tensor] = {}
        moved = [link for link in read_links(self.family) if link.fold == "weights"]
        for link in moved if self._spec.reorders else ():
            heads = self.heads.keys if link.per_head else 1
            order = self._clusters[link.kind].order
            for path in link.producers:
                found[path] = order_of_outputs(block.get_submodule(path), order, link.rows, heads)
        return found

    def turns_of_outputs(self, block: nn.Module) -> dict[str, Tensor]:
        """How outputs of matrices were turned before `apply`, by path in ``block``.

        See `quantine.activations.rotated_values.turns_of_outputs`.
        """
        link = value_link(self.family) if self._rotates_values else None
        return {} if link is None else turns_of_outputs(block, link, self.heads)

    def clusters_at(self, point: RoundingPoint) -> Clusters:
        """The clusters of the channels at ``point``, in the order they have after `apply`."""
        if point.site == "value" and self._values is not None:
            return self._values
        if point.path in self._smoothings:  # heads are mixed
            return Clusters(torch.zeros_like(self.ranges_at(point).lows[0], dtype=torch.int64))
        link = link_of(self.family, point.kind)
        own = self._clusters[point.kind]
        ordered = own if link.fold == "attention" or not self._spec.reorders else own.ordered()
        wide = point.site in {"query", "attention"}
        # A tensor's one grid is not copied for each head.
        copies = self.heads.copies if wide else 1
        if not self._spec.reorders:
            return Clusters(own.labels.repeat(copies))
        return ordered.shared(self.heads.keys, copies) if copies > 1 else ordered

    def input_clusters(self, path: str) -> Clusters | None:
        """The clusters of the inputs of the matrix at ``path`` inside the block, if it has some."""
        points = [point for point in rounding_points(self.family) if point.path == path]
        return self.clusters_at(points[0]) if points else None

    def maps(self) -> dict[str, Tensor]:
        """The ranges and clusters of all channels, for pictures.

        Returns:
            By reorder ``[channels, features + 1]`` float32, channels in the model's own order: the
            largest and the smallest value of each channel in the samples that are not held out (for
            R2 first of queries, then of keys), and its cluster. Empty without reordering. Of
            channels that are rotated, they are those of the rotated ones.
        """
        links = read_links(self.family) if self._spec.reorders else ()
        return {
            link.kind: torch.column_stack([self._points(link), self._clusters[link.kind].labels])
            for link in links
        }

    def grid(self, point: RoundingPoint, bits: int) -> StaticGrid:
        """The static grid that ``point`` has before any search."""
        grid = self._plain_grid(point, bits)
        if point.path not in self._smoothings:
            return grid
        return RotatedGrid(grid, self._smoothings[point.path], self._centres[point.path])

    def _plain_grid(self, point: RoundingPoint, bits: int) -> StaticGrid:
        labels = self.clusters_at(point).labels
        seen = self.ranges_at(point)
        if self._spec.range == "running":
            fitted = fit_activations_as_published(*seen.of_clusters(labels, "running"), bits)
        else:
            ends = seen.of_clusters(labels)
            fine = self._spec.range == "search" and bits >= FINE_BITS
            if fine and point.site in SITES_WITH_FACTORS and self.has_factors(point):
                scale, zero = fit_activations_around_zero(*ends, bits)
                return StaticGrid(bits, scale, zero, labels.to(LABELS), reach=scale.new_ones(1))
            fitted = fit_activations(*(widened(*ends) if fine else ends), bits)
        return StaticGrid(bits, *fitted, labels.to(LABELS))

    def has_factors(self, point: RoundingPoint) -> bool:
        """Whether tokens may have factors at ``point``.

        That takes an activation which only matrices read, or rotated values, and reordered
        channels. See `quantine.kernels.integer.token_factors`.
        """
        if point.site in ATTENDED:
            return point.site == "value" and self._rotates_values
        return self._spec.token_factors and self._spec.reorders

    @property
    def has_mixed_keys(self) -> bool:
        """Whether channels of keys may have different numbers of bits."""
        return self._spec.mixed_keys

    def ranges_at(self, point: RoundingPoint) -> ChannelRanges:
        """Calibration ranges at ``point``, channels in the order they have after `apply`.

        Of rotated channels they are those of what differs from the mean of a channel.
        """
        found = self._ranges[point.path]
        link = link_of(self.family, point.kind)
        if link.fold == "attention" or not self._spec.reorders:
            return found
        order = self._clusters[point.kind].order
        heads = self.heads.keys if link.per_head else 1
        copies = found.lows.shape[1] // len(order)
        return found.ordered(order_within_heads(order, heads, copies))

    def _clustered(self, link: Link) -> Clusters:
        count = self._spec.clusters_of(link.kind)
        points = self._points(link)
        if not self._spec.reorders:
            return Clusters(points.new_zeros(len(points), dtype=torch.int64))
        return cluster_channels(points, count, self.heads.keys if link.per_head else 1)

    def _clustered_values(self) -> Clusters | None:
        """The clusters of values, where the spec asks for others than the reorder R3 has."""
        count = self._spec.value_clusters
        if count is None or not self._spec.reorders:
            return None
        points = [point for point in rounding_points(self.family) if point.site == "value"]
        if not points:
            return None
        (point,) = points
        low, high = self.ranges_at(point).after(self.held_out).of_channels()
        return cluster_channels(torch.stack([high, low], 1), count, self.heads.keys)

    def _points(self, link: Link) -> Tensor:
        """The points that KMeans clusters: for each channel the largest and the smallest value.

        ``[channels, features]`` float32. There are two features, or four where both queries and
        keys count. Heads of queries that share a head of keys and values are merged.
        """
        seen = [p for p in rounding_points(self.family) if p.kind == link.kind]
        read = [p for p in seen if p.site not in ATTENDED][:1] or seen
        features: list[Tensor] = []
        for point in read:
            low, high = self._ranges[point.path].after(self.held_out).of_channels()
            if point.site in {"query", "attention"}:
                shape = (self.heads.keys, self.heads.copies, -1)
                low, high = low.view(shape).amin(1).flatten(), high.view(shape).amax(1).flatten()
            features += [high, low]
        return torch.stack(features, 1)
