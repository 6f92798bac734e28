"""The grid of each place of a block that changes the block's output least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from quantine.activations.grids import StaticGrid
from quantine.activations.install import ATTENDED, RoundingPoint, link_of, rounding_points
from quantine.calibrate.sequential import Sequential
from quantine.core.activation_spec import FINE_BITS
from quantine.core.fit_range import (
    fit_activations,
    fit_activations_around_zero,
    fit_activations_as_published,
)
from quantine.families.family import Family
from quantine.families.layers import is_transposed
from quantine.rptq.feedback import feedback_of
from quantine.rptq.ranges import cheapest_ranges, through
from quantine.rptq.reordering import Reordering
from quantine.statistics.channel_ranges import ChannelRanges, Over
from quantine.statistics.losses import token_loss

SEARCH_TOKENS: Final = 2048
"""Calibration tokens that rank grids: each is tried on the whole block, which takes the time."""

REACHES: Final = (1.0, 0.85, 0.7)
"""Shares of a token's largest value that its factor may put on the end of a grid; see
`quantine.kernels.integer.token_factors.steepness`."""
WITH_FACTORS: Final[tuple[Over, ...]] = ("all", "mean")
"""The ranges that clusters have there: of these only their proportions matter."""


@dataclass(frozen=True)
class CandidateGrid:
    """What `StaticGrid.refit` takes.

    Attributes:
        scale, zero: ``[clusters]`` float32.
        feedback: ``[heads, dim, dim]`` float16, if there is any.
        reach: of the factors of tokens, if they have any.
    """

    scale: Tensor
    zero: Tensor
    feedback: Tensor | None = None
    reach: float | None = None


def ranking_batches(sequential: Sequential) -> int:
    """How many batches, the first ones, rank grids: half of them, but one at least."""
    tokens = sequential.hidden[0].shape[:2].numel()
    return max(1, min(-(-SEARCH_TOKENS // tokens), len(sequential.hidden) // 2))


def ranking_samples(sequential: Sequential) -> int:
    """The samples of `ranking_batches` that can be held out: none, where there are no others."""
    batches = ranking_batches(sequential)
    return batches * len(sequential.hidden[0]) if batches < len(sequential.hidden) else 0


def choose_grids(
    sequential: Sequential,
    index: int,
    block: nn.Module,
    reordering: Reordering,
    before: Sequence[Tensor],
) -> None:
    """Give one site of ``block`` after another the grid that changes its output least.

    Args:
        before: what the block put out with no grid, for the batches that rank grids.
    """
    candidates = Candidates(reordering, block)
    for shared in _rounded(reordering.family, block):
        grids = [block.get_submodule(place.grid) for place in shared]
        first = grids[0]
        assert isinstance(first, StaticGrid)
        if first.bits >= FINE_BITS:
            continue
        changes = []
        for candidate in candidates.of(shared[0], first.bits, final=False):
            _refit(grids, candidate)
            changes.append(token_loss(before, sequential.outputs(index, len(before))))
        best = changes.index(min(changes))
        _refit(grids, candidates.of(shared[0], first.bits, final=True)[best])


def _refit(grids: Sequence[nn.Module], fitted: CandidateGrid) -> None:
    for grid in grids:
        assert isinstance(grid, StaticGrid)
        reach = None if fitted.reach is None else fitted.scale.new_tensor([fitted.reach])
        grid.refit(fitted.scale, fitted.zero, fitted.feedback, reach)


def _rounded(family: Family, block: nn.Module) -> list[list[RoundingPoint]]:
    """The rounding_points of ``block`` with static grids; those that read the same share one."""
    shared: dict[tuple[str, str], list[RoundingPoint]] = {}
    modules = dict(block.named_modules())
    for place in rounding_points(family):
        if isinstance(modules.get(place.grid), StaticGrid):
            shared.setdefault((place.site, place.kind), []).append(place)
    return list(shared.values())


class Candidates:
    """Grids that a search chooses from.

    Args:
        reordering: of ``block``.
        block: reordered, with its float weights.
    """

    def __init__(self, reordering: Reordering, block: nn.Module) -> None:
        self._reordering, self._block = reordering, block
        self._family, self._heads = reordering.family, reordering.heads

    def of(self, place: RoundingPoint, bits: int, final: bool) -> list[CandidateGrid]:
        """What may round a place.

        Args:
            final: know all samples.
        """
        labels, seen = self._reordering.clusters_at(place).labels, self._shown(place, final)
        whole = fit_activations(*seen.of_clusters(labels), bits)
        searched = cheapest_ranges(seen, self._importance(place, final), labels, bits)
        running = fit_activations_as_published(*seen.of_clusters(labels, "running"), bits)
        found = [CandidateGrid(*whole), CandidateGrid(*running), CandidateGrid(*searched)]
        if self._reordering.has_factors(place):
            found += [
                CandidateGrid(
                    *fit_activations_around_zero(*seen.of_clusters(labels, over), bits), reach=reach
                )
                for over in WITH_FACTORS
                for reach in REACHES
            ]
        if place.site not in ATTENDED:
            return found
        feedback = feedback_of(self._moments(place, final))
        scale, zero = fit_activations(*seen.of_clusters(labels, "mean"), bits)
        means = [zero]
        if place.site != "query":
            # Every later token attends to the first one, whose keys and values hardly depend on
            # what it is: what rounding makes of them is an error of all tokens.
            means.append(through(seen.firsts.mean(0), scale, zero, labels))
        fed = [whole, searched, *((scale, zero) for zero in means)]
        return [*found, *(CandidateGrid(*grid, feedback) for grid in fed)]

    def _shown(self, place: RoundingPoint, final: bool) -> ChannelRanges:
        seen = self._reordering.ranges_at(place)
        return seen if final else seen.after(self._reordering.held_out)

    def _moments(self, place: RoundingPoint, final: bool) -> Tensor:
        """Second moments of what a head's channels are multiplied by in attention.

        Returns:
            ``[heads, dim, dim]`` float32, by heads of the place.
        """
        keys, copies = self._heads.keys, self._heads.copies
        if place.site == "value":
            (path,) = link_of(self._family, place.kind).consumers
            rows = matrix_of(self._block.get_submodule(path))
        else:
            rows = self._shown(self._met(place), final).rows
        of_queries = place.site != "query"  # or of columns that stand for a query's head
        shape = (len(rows), keys, copies if of_queries else 1, -1)
        states = rows.reshape(shape).permute(1, 2, 0, 3).flatten(1, 2)
        moments = states.transpose(1, 2) @ states
        return moments if of_queries else moments.repeat_interleave(copies, 0)

    def _met(self, place: RoundingPoint) -> RoundingPoint:
        """The keys that queries meet, or the other way round."""
        other = "key" if place.site == "query" else "query"
        path = f"{place.path.rpartition('.')[0]}.{other}"
        return next(found for found in rounding_points(self._family) if found.path == path)

    def _importance(self, place: RoundingPoint, final: bool) -> Tensor:
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
                    matrix_of(self._block.get_submodule(path)).square().sum(0)
                    for path in link_of(self._family, place.kind).consumers
                ]
            ).sum(0)
        return self._for_heads(strength, len(self._reordering.ranges_at(place).rows[0]))

    def _for_heads(self, strength: Tensor, channels: int) -> Tensor:
        """``strength`` of channels, for as many as there are in heads of another number."""
        if channels == len(strength):
            return strength
        if channels < len(strength):
            return strength.view(self._heads.keys, self._heads.copies, -1).sum(1).flatten()
        width = len(strength) // self._heads.keys
        return strength.view(-1, width).repeat_interleave(self._heads.copies, 0).flatten()


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of ``module`` as ``[out, in]``."""
    weight = module.get_parameter("weight").detach()
    return weight.T if is_transposed(module) else weight
