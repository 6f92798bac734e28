"""The search for static grids: at each point, the one that changes the block's output least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
from quantine.rptq.widths import mixed_grid
from quantine.statistics.channel_ranges import ChannelRanges, Over
from quantine.statistics.losses import token_loss

SEARCH_TOKENS: Final = 2048
"""Number of calibration tokens that candidate grids are compared on. Each candidate is tried on the
whole block, which takes most of the search's time."""

REACHES: Final = (1.0, 0.85, 0.7)
"""Candidates for the ``reach`` of token factors, see
`quantine.kernels.integer.token_factors.steepness`."""
WITH_FACTORS: Final[tuple[Over, ...]] = ("all", "mean")
"""Candidate ranges of clusters where tokens have factors: only their proportions matter there."""
LEAST_END: Final = 1e-30
"""Least end of a grid, so that scales are positive where nothing but zeros was seen."""
BETWEEN: Final = ("query", "key")
"""The sites that are multiplied with each other."""


@dataclass(frozen=True)
class CandidateGrid:
    """A static grid that the search may choose; the attributes are those of `StaticGrid`.

    Attributes:
        scale, zero: ``[clusters]`` float32.
        feedback: ``[heads, dim, dim]`` float16; ``None`` rounds to nearest.
        reach, head_reach: set the factors of tokens; ``None`` for no factors.
        widths: ``[clusters]`` uint8, bits of clusters where they differ.
    """

    scale: Tensor
    zero: Tensor
    feedback: Tensor | None = None
    reach: Tensor | None = None
    head_reach: Tensor | None = None
    widths: Tensor | None = None


def ranking_batches(sequential: Sequential) -> int:
    """Number of calibration batches, from the first, on which candidate grids are compared.

    As many as hold `SEARCH_TOKENS` tokens, but at most half of all batches and those of the first
    shard, and at least one.
    """
    tokens = sequential.hidden[0].shape[:2].numel()
    most = min(sequential.batches // 2, sequential.judged)
    return max(1, min(-(-SEARCH_TOKENS // tokens), most))


def ranking_samples(sequential: Sequential) -> int:
    """Number of samples in the `ranking_batches`, which candidates are fitted without.

    0 where there are no other batches to fit candidates to.
    """
    batches = ranking_batches(sequential)
    return batches * len(sequential.hidden[0]) if batches < sequential.batches else 0


def choose_grids(
    sequential: Sequential,
    index: int,
    block: nn.Module,
    reordering: Reordering,
    before: Sequence[Tensor],
) -> None:
    """Choose the static grids of a block, one site after another.

    Each site takes the candidate with which the block's output differs least from ``before``, the
    sites before it having theirs. Candidates are compared without knowing the samples they are
    compared on, by the first rank; the winner is then fitted to all samples. Sites of `FINE_BITS`
    bits or more keep the grid they have.

    Args:
        sequential: the calibration text, as it enters the block.
        index: number of the block.
        block: the block, reordered and with its grids installed; these are changed in place.
        reordering: the block's clusters and calibration ranges.
        before: outputs of the block before grids were installed, for the batches that rank
            grids, on the first rank.
    """
    ranks = sequential.setup.ranks
    candidates = Candidates(reordering, block)
    for shared in _rounded(reordering.family, block):
        grids = [block.get_submodule(point.grid) for point in shared]
        first = grids[0]
        assert isinstance(first, StaticGrid)
        if first.bits >= FINE_BITS:
            continue
        offered = candidates.of(shared[0], first.bits, final=False) if ranks.first else []
        best = ranks.of_first(partial(_best, sequential, index, grids, offered, before))
        _refit(grids, candidates.of(shared[0], first.bits, final=True)[best])


def _best(
    sequential: Sequential,
    index: int,
    grids: Sequence[nn.Module],
    offered: Sequence[CandidateGrid],
    before: Sequence[Tensor],
) -> int:
    """The number of the candidate with which the block's output differs least."""
    changes = []
    for candidate in offered:
        _refit(grids, candidate)
        changes.append(token_loss(before, sequential.outputs(index, len(before))).value)
    return changes.index(min(changes))


def _refit(grids: Sequence[nn.Module], fitted: CandidateGrid) -> None:
    for grid in grids:
        assert isinstance(grid, StaticGrid)
        grid.refit(
            fitted.scale,
            fitted.zero,
            fitted.feedback,
            fitted.reach,
            fitted.head_reach,
            fitted.widths,
        )


def _rounded(family: Family, block: nn.Module) -> list[list[RoundingPoint]]:
    """The points of ``block`` with static grids, in lists of those that read the same activation.

    Points of one list get the same grid.
    """
    shared: dict[tuple[str, str], list[RoundingPoint]] = {}
    modules = dict(block.named_modules())
    for point in rounding_points(family):
        if isinstance(modules.get(point.grid), StaticGrid):
            shared.setdefault((point.site, point.kind), []).append(point)
    return list(shared.values())


class Candidates:
    """The candidate grids of the points of one block.

    Args:
        reordering: the block's clusters and calibration ranges.
        block: the block, reordered, with its float weights.
    """

    def __init__(self, reordering: Reordering, block: nn.Module) -> None:
        self._reordering, self._block = reordering, block
        self._family, self._heads = reordering.family, reordering.heads

    def of(self, point: RoundingPoint, bits: int, final: bool) -> list[CandidateGrid]:
        """The candidate grids of one point, always in the same order.

        Args:
            point: where they round.
            bits: number of bits of one code, 2 to 8.
            final: fit them to all calibration samples, not only to those that candidates are not
                compared on.
        """
        labels, seen = self._reordering.clusters_at(point).labels, self._shown(point, final)
        whole = fit_activations(*seen.of_clusters(labels), bits)
        searched = cheapest_ranges(seen, self._importance(point, final), labels, bits)
        running = fit_activations_as_published(*seen.of_clusters(labels, "running"), bits)
        found = [CandidateGrid(*whole), CandidateGrid(*running), CandidateGrid(*searched)]
        if self._reordering.has_factors(point):
            factors = self._with_factors(point, seen, labels, bits)
            if point.site in ATTENDED:  # values that were rotated for these
                return factors
            found += factors
        if point.site not in ATTENDED or not (point.site in BETWEEN or self._readers(point)):
            return found
        feedback = feedback_of(self._moments(point, final))
        scale, zero = fit_activations(*seen.of_clusters(labels, "mean"), bits)
        means = [zero]
        if point.site != "query":
            # Every later token attends to the first one, whose keys and values hardly depend on
            # what it is: what rounding makes of them is an error of all tokens.
            means.append(through(seen.firsts.mean(0), scale, zero, labels))
        fed = [whole, searched, *((scale, zero) for zero in means)]
        found += [CandidateGrid(*grid, feedback) for grid in fed]
        if point.site == "key" and self._reordering.has_mixed_keys:
            found += self._mixed(point, seen, labels, bits, final)
        return found

    def _with_factors(
        self, point: RoundingPoint, seen: ChannelRanges, labels: Tensor, bits: int
    ) -> list[CandidateGrid]:
        """Candidates with factors of tokens, or for values of tokens in each head."""
        grids = [
            fit_activations_around_zero(*seen.of_clusters(labels, over), bits)
            for over in WITH_FACTORS
        ]
        if point.site in ATTENDED:
            low, high = seen.of_clusters(labels, "mean")
            middle = torch.full_like(low, (2**bits - 1) / 2)
            # Rotated channels are as often above zero as below: steps lie on both sides alike.
            grids.append((torch.maximum(high, -low).clamp(min=LEAST_END) / middle, middle))
        found = []
        for grid in grids:
            for reach in REACHES:
                if point.site in ATTENDED:
                    of_heads = grid[0].new_full((self._heads.keys,), reach)
                    found.append(CandidateGrid(*grid, head_reach=of_heads))
                else:
                    found.append(CandidateGrid(*grid, reach=grid[0].new_tensor([reach])))
        return found

    def _mixed(
        self, point: RoundingPoint, seen: ChannelRanges, labels: Tensor, bits: int, final: bool
    ) -> list[CandidateGrid]:
        """Candidates whose channels have different numbers of bits."""
        importance, heads = self._importance(point, final), self._heads.keys
        scale, zero, widths = mixed_grid(seen, importance, labels, bits, heads)
        shifted = through(seen.firsts.mean(0), scale, zero, labels)
        shifted = torch.where(widths > 0, shifted, zero)
        feedback = feedback_of(self._moments(point, final))
        return [
            CandidateGrid(scale, zero, widths=widths),
            CandidateGrid(scale, shifted, widths=widths),
            CandidateGrid(scale, zero, feedback, widths=widths),
            CandidateGrid(scale, shifted, feedback, widths=widths),
        ]

    def _shown(self, point: RoundingPoint, final: bool) -> ChannelRanges:
        seen = self._reordering.ranges_at(point)
        return seen if final else seen.after(self._reordering.held_out)

    def _moments(self, point: RoundingPoint, final: bool) -> Tensor:
        """Second moments of the vectors that a head's channels are multiplied with in attention.

        Keys for queries, queries for keys, rows of the output projection for values.

        Returns:
            ``[heads, dim, dim]`` float32, for the heads of the point.
        """
        keys, copies = self._heads.keys, self._heads.copies
        if point.site == "value":
            rows = torch.cat(self._readers(point))
        else:
            rows = self._shown(self._met(point), final).rows
        of_queries = point.site != "query"  # or of columns that stand for a query's head
        shape = (len(rows), keys, copies if of_queries else 1, -1)
        states = rows.reshape(shape).permute(1, 2, 0, 3).flatten(1, 2)
        moments = states.transpose(1, 2) @ states
        return moments if of_queries else moments.repeat_interleave(copies, 0)

    def _met(self, point: RoundingPoint) -> RoundingPoint:
        """The point of the keys for that of queries, and the other way round."""
        other = "key" if point.site == "query" else "query"
        path = f"{point.path.rpartition('.')[0]}.{other}"
        return next(found for found in rounding_points(self._family) if found.path == path)

    def _importance(self, point: RoundingPoint, final: bool) -> Tensor:
        """Weights of the channels' squared errors in the error of what reads them.

        For inputs of matrices and for values, the sum of squares of the weight's column that a
        channel is multiplied with; for queries and keys, the mean square of the channel they are
        multiplied with. Values count alike where it is not known what reads them. These are the
        expected errors where channels err independently.

        Returns:
            ``[channels]`` float32.
        """
        rows, readers = self._reordering.ranges_at(point).rows, self._readers(point)
        if point.site in BETWEEN:
            strength = self._shown(self._met(point), final).rows.square().mean(0)
        elif readers:
            strength = torch.stack([matrix.square().sum(0) for matrix in readers]).sum(0)
        else:
            strength = torch.ones_like(rows[0])
        return self._for_heads(strength, len(rows[0]))

    def _readers(self, point: RoundingPoint) -> list[Tensor]:
        """The matrices ``[out, in]`` that read the channels of ``point`` in their order."""
        paths = link_of(self._family, point.kind).consumers
        return [matrix_of(self._block.get_submodule(path)) for path in paths]

    def _for_heads(self, strength: Tensor, channels: int) -> Tensor:
        """``strength`` of channels for another number of heads, ``[channels]``.

        Heads of keys and values get the sum over the heads of queries that share them; heads of
        queries get what their head of keys and values has.
        """
        if channels == len(strength):
            return strength
        if channels < len(strength):
            return strength.view(self._heads.keys, self._heads.copies, -1).sum(1).flatten()
        width = len(strength) // self._heads.keys
        return strength.view(-1, width).repeat_interleave(self._heads.copies, 0).flatten()


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of ``module`` as ``[out, in]``, also where it is stored transposed."""
    weight = module.get_parameter("weight").detach()
    return weight.T if is_transposed(module) else weight
