"""KMeans for points of few features, many problems at once, on the device of the points.

Starts are drawn as greedy k-means++ does (Arthur and Vassilvitskii, 2007), then centres are moved
to drawn points where that, and a few of Lloyd's steps, lessen the error (Lattanzi and Sohler,
"A Better k-means++ Algorithm via Local Search", 2019). The best start is settled by Lloyd's steps.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.core.device import CPU

SEED: Final = 0
"""Seed of what is drawn, so that clusters are the same in every run."""
MOST_DISTANCES: Final = 2**18
"""Number of distances that all starts of a problem may have; it decides how many there are."""
STARTS: Final = (2, 8)
"""Least and most starts of a problem."""
DRAWN: Final = 8
"""Points that are drawn at a time, of which one may become a centre."""
MOVES: Final = 8
"""Number of times that a centre may be moved to a drawn point."""
FIRST_STEPS: Final = 4
"""Lloyd's steps after the start."""
MOVE_STEPS: Final = 2
"""Lloyd's steps after a move, before its error is looked at."""
STEPS_AT_ONCE: Final = 8
"""Lloyd's steps between two looks at whether the centres stand still: only these wait for the
device."""
MOST_STEPS: Final = 304
"""Lloyd's steps after which centres that still move are taken as they are."""
DRAW_BITS: Final = 24
"""Bits of a drawn number. With those of `SHARE_BITS`, products fit an int64."""
SHARE_BITS: Final = 36
"""Bits of the sum of all points' shares of an error, as integers: sums of floats by scan would not
be repeatable on CUDA."""


def kmeans(points: Tensor, count: int) -> Tensor:
    """The cluster of each point, by KMeans, for each of several problems.

    The result is the same whenever it is computed on one kind of device.

    Args:
        points: ``[problems, n, features]`` of any float dtype, finite.
        count: number of clusters of a problem, from 1.

    Returns:
        ``[problems, n]`` int64 on the device of ``points``: numbers below ``count``. There are
        empty clusters only where fewer than ``count`` points differ.
    """
    problems, n, features = points.shape
    count = min(count, n)
    starts = starts_of(n, count)
    points = points.to(torch.float32)
    points = points / points.abs().amax((1, 2), keepdim=True).clamp_(min=1e-30)
    repeated = _Points(points.repeat_interleave(starts, 0))
    drawn = _draw(count + MOVES, len(repeated.rows)).to(points.device)
    centres = repeated.spread(drawn[:count], count)
    for _ in range(FIRST_STEPS):
        centres = repeated.step(centres)
    centres, errors = repeated.moved(centres, drawn[count:])
    best = errors.view(problems, starts).argmin(1).view(problems, 1, 1, 1)
    centres = centres.view(problems, starts, count, features)
    centres = centres.gather(1, best.expand(-1, -1, count, features)).squeeze(1)
    once = _Points(points)
    return once.distances(once.settled(centres)).argmin(1)


def starts_of(n: int, count: int) -> int:
    """Number of starts of a problem of ``n`` points and ``count`` clusters."""
    least, most = STARTS
    return min(max(MOST_DISTANCES // (n * count), least), most)


def _draw(rounds: int, rows: int) -> Tensor:
    """Numbers below ``2**DRAW_BITS``, ``[rounds, rows, DRAWN]`` int64, on the CPU.

    They are drawn there, so that they are the same for all devices.
    """
    generator = torch.Generator(CPU).manual_seed(SEED)
    size = rounds, rows, DRAWN
    return torch.randint(2**DRAW_BITS, size, generator=generator, dtype=torch.int64, device=CPU)


class _Points:
    """Points ``[rows, n, features]`` float32, and what can be done with centres of each row.

    Centres are ``[rows, count, features]`` float32, distances squared.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._features = [one.unsqueeze(1).contiguous() for one in rows.unbind(-1)]
        self._summed = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)

    def distances(self, centres: Tensor) -> Tensor:
        """``[rows, centres, n]``. Differences are squared, as expanded squares would cancel."""
        found: Tensor | None = None
        for points, own in zip(self._features, centres.unbind(-1), strict=True):
            away = own.unsqueeze(-1) - points
            found = away.square_() if found is None else found.addcmul_(away, away)
        assert found is not None
        return found

    def step(self, centres: Tensor) -> Tensor:
        """Centres moved to the mean of the points that are nearest to them (Lloyd's step).

        A point with two nearest centres counts for both. A centre without points stays.
        """
        found = self.distances(centres)
        nearest = found.sub_(found.amin(1, keepdim=True)).eq_(0)
        sums = nearest @ self._summed
        counts = sums[..., -1:]
        return torch.where(counts > 0, sums[..., :-1] / counts, centres)

    def spread(self, drawn: Tensor, count: int) -> Tensor:
        """``count`` points as centres, each the best of `DRAWN` that are drawn by their error."""
        first = (drawn[0, :, :1] * self.rows.shape[1]) >> DRAW_BITS
        centres = [self._chosen(first)]
        errors = self.distances(centres[0]).squeeze(1)
        for numbers in drawn[1:count]:
            points = self._chosen(_by_share(errors, numbers))
            after = torch.minimum(self.distances(points), errors.unsqueeze(1))
            best = after.sum(2).argmin(1).view(-1, 1, 1)
            errors = _row(after, best).squeeze(1)
            centres.append(_row(points, best))
        return torch.cat(centres, 1)

    def moved(self, centres: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Centres after as many attempts to move one of them as ``drawn`` has, and their errors.

        An attempt moves the centre that is missed least to the point that helps most, of `DRAWN`
        points. It is kept where the sum of errors is less after some of Lloyd's steps.
        """
        count = centres.shape[1]
        numbers = torch.arange(count, device=centres.device)
        found = self.distances(centres)
        errors = found.amin(1)
        for of_round in drawn:
            nearest = found == errors.unsqueeze(1)
            second = found.masked_fill(nearest, torch.inf).amin(1)
            points = self._chosen(_by_share(errors, of_round))
            there = self.distances(points)
            kept = torch.minimum(there, errors.unsqueeze(1))
            lost = torch.minimum(there, second.unsqueeze(1)).sub_(kept)
            if count == 1:
                lost = there - kept
            after = kept.sum(2, keepdim=True) + lost @ nearest.to(lost.dtype).transpose(1, 2)
            best = after.flatten(1).argmin(1).view(-1, 1, 1)
            here = (numbers == best.squeeze(2) % count).unsqueeze(2)
            tried = torch.where(here, _row(points, best // count), centres)
            for _ in range(MOVE_STEPS):
                tried = self.step(tried)
            distances = self.distances(tried)
            least = distances.amin(1)
            better = (least.sum(1) < errors.sum(1)).view(-1, 1, 1)
            centres = torch.where(better, tried, centres)
            found = torch.where(better, distances, found)
            errors = torch.where(better.squeeze(1), least, errors)
        return centres, errors.sum(1)

    def settled(self, centres: Tensor) -> Tensor:
        """Centres after Lloyd's steps until they stand still, none without points."""
        for _ in range(0, MOST_STEPS, STEPS_AT_ONCE):
            before = centres
            for _ in range(STEPS_AT_ONCE):
                before, centres = centres, self.step(centres)
            centres = self._refilled(centres)
            if torch.equal(before, centres):
                break
        return centres

    def _refilled(self, centres: Tensor) -> Tensor:
        """Centres of which those without points stand on the points with the largest errors."""
        found = self.distances(centres)
        errors, nearest = found.min(1)
        empty = torch.ones_like(centres[..., 0]).scatter_(1, nearest, 0.0) > 0
        worst = errors.topk(centres.shape[1])
        turn = (empty.cumsum(1) - 1).clamp_(min=0)
        useful = empty & (worst.values.gather(1, turn) > 0)
        points = self._chosen(worst.indices.gather(1, turn))
        return torch.where(useful.unsqueeze(2), points, centres)

    def _chosen(self, indices: Tensor) -> Tensor:
        """The points at ``indices`` ``[rows, m]``: ``[rows, m, features]``."""
        return self.rows.gather(1, indices.unsqueeze(2).expand(-1, -1, self.rows.shape[2]))


def _row(of: Tensor, index: Tensor) -> Tensor:
    """The parts at ``index`` ``[rows, 1, 1]`` of ``of`` ``[rows, k, m]``: ``[rows, 1, m]``."""
    return of.gather(1, index.expand(-1, 1, of.shape[2]))


def _by_share(errors: Tensor, drawn: Tensor) -> Tensor:
    """Indices ``[rows, m]`` of points, as likely as they share in ``errors`` ``[rows, n]``.

    Where all errors are zero, it is the last one.
    """
    scale = 2.0**SHARE_BITS / errors.sum(1, keepdim=True).clamp_(min=1e-30)
    upto = (errors * scale).ceil_().to(torch.int64).cumsum(1)
    places = torch.searchsorted(upto, (upto[:, -1:] * drawn) >> DRAW_BITS, right=True)
    return places.clamp_(max=errors.shape[1] - 1)
