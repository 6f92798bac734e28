"""Streaming statistics of a layer's input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from quantine.errors import SolverError


@dataclass(frozen=True)
class Factor:
    """The triangular factor that error feedback runs on (GPTQ, arXiv 2210.17323, section 3).

    Attributes:
        upper: ``[in, in]`` float32 upper triangular ``U`` with ``inverse(H) = U.T @ U``, rows and
            columns in the order of ``order``.
        order: ``[in]`` int64: position ``j`` is input ``order[j]``.
        damp: share of the mean diagonal that was really added to the diagonal of ``H``.
    """

    upper: Tensor
    order: Tensor
    damp: float


Over = Literal["all", "mean", "running"]
"""See `MinMax.of_clusters`."""
NEWEST: Final = 0.01
"""Weight of the newest sample in running statistics."""
ROWS_PER_SAMPLE: Final = 16
"""Tokens of each sample that are kept as they are."""
PANEL: Final = 256
"""Columns of a symmetric product that are multiplied at once."""
LEAF: Final = 128
"""Largest matrix that is factored without halving it."""


class Hessian:
    """Sum of ``x x.T`` over tokens, for one input shared by one or more matrices.

    Every token counts: calibration segments are cut from a stream of text at full length, so no
    padding exists that would have to be masked out.

    Args:
        in_features: length of ``x``.
        add: how ``rows.T @ rows`` is added, see `add_gram`.
    """

    def __init__(
        self, in_features: int, add: Callable[[Tensor, Tensor], None] | None = None
    ) -> None:
        self._add = add or add_gram
        self.matrix = torch.zeros(in_features, in_features)
        self.tokens = 0
        self._factor: Factor | None = None
        self._damp: float | None = None

    def update(self, x: Tensor) -> None:
        """Add inputs ``x`` ``[..., in]``."""
        rows = x.reshape(-1, x.shape[-1])
        self._add(self.matrix, rows)
        self.tokens += rows.shape[0]
        self._factor = None

    def merge(self, other: Hessian) -> None:
        """Add what ``other`` has seen."""
        self.matrix += other.matrix
        self.tokens += other.tokens
        self._factor = None

    @property
    def damp_used(self) -> float | None:
        """Damping of the last factorization, ``None`` before the first."""
        return None if self._factor is None else self._factor.damp

    def factor(self, damp: float, order: Tensor) -> Factor:
        """The factor of the damped Hessian; the last one is kept, for matrices that share it."""
        kept = self._factor
        if kept is None or self._damp != damp or not torch.equal(kept.order, order):
            self._factor = kept = factorize(self.matrix, damp, order)
            self._damp = damp
        return kept

    def inverse_diagonal(self) -> Tensor | None:
        """Diagonal of the inverse of the damped mean of ``x x.T``; ``None`` before a factorization.

        Returns:
            ``[in]`` float32 in input order, from the last factor. Infinite for inputs that were
            never active: no error there reaches the output.
        """
        factor = self._factor
        if factor is None:
            return None
        diagonal = self.matrix.diagonal()
        # A column's norm of U; the factor is that of H in units of its mean diagonal.
        ordered = torch.linalg.vector_norm(factor.upper, dim=0).square_()
        inverse = torch.empty_like(ordered)
        inverse[factor.order] = ordered * (self.tokens / (diagonal.mean().item() or 1.0))
        return inverse.masked_fill_(diagonal == 0, math.inf)

    def error_energy(self, delta: Tensor) -> float:
        """``tr(delta H delta.T)``: squared output error of a weight change ``[out, in]``."""
        return float(((delta @ self.matrix) * delta).sum(dtype=torch.float64))


class MinMax:
    """Smallest and largest value of every channel in each sample, and some values as they are.

    Attributes:
        lows, highs: ``[samples, channels]`` float32.
        firsts: ``[samples, channels]`` float32, the first token of each sample.
        rows: ``[n, channels]`` float32, up to `ROWS_PER_SAMPLE` tokens of each sample.
        tokens: seen in all samples.
    """

    def __init__(self, channels: int) -> None:
        self.lows = torch.empty(0, channels)
        self.highs = torch.empty(0, channels)
        self.firsts = torch.empty(0, channels)
        self.rows = torch.empty(0, channels)
        self.tokens = 0

    def update(self, x: Tensor, samples: int) -> None:
        """Add ``x`` ``[..., channels]``, the values of ``samples`` samples one after another."""
        rows = x.detach().float().reshape(samples, -1, x.shape[-1])
        self.lows = torch.cat([self.lows, rows.amin(1)])
        self.highs = torch.cat([self.highs, rows.amax(1)])
        self.firsts = torch.cat([self.firsts, rows[:, 0]])
        step = max(1, rows.shape[1] // ROWS_PER_SAMPLE)
        kept = rows[:, step - 1 :: step][:, :ROWS_PER_SAMPLE]
        self.rows = torch.cat([self.rows, kept.flatten(0, 1)])
        self.tokens += rows.shape[0] * rows.shape[1]

    def of_channels(self) -> tuple[Tensor, Tensor]:
        """Ends of each channel's range over all samples, ``[channels]`` float32 each."""
        return self.lows.amin(0), self.highs.amax(0)

    def after(self, samples: int) -> MinMax:
        """What the samples after the first ``samples`` showed."""
        result, share = MinMax(self.lows.shape[1]), samples / len(self.lows)
        result.lows, result.highs = self.lows[samples:], self.highs[samples:]
        result.firsts = self.firsts[samples:]
        result.rows = self.rows[round(len(self.rows) * share) :]
        result.tokens = self.tokens - round(self.tokens * share)
        return result

    def ordered(self, order: Tensor) -> MinMax:
        """The same of the channels in another order: ``order[j]`` at place ``j``."""
        result = MinMax(len(order))
        result.lows, result.highs = self.lows[:, order], self.highs[:, order]
        result.firsts = self.firsts[:, order]
        result.rows, result.tokens = self.rows[:, order], self.tokens
        return result

    def of_clusters(self, labels: Tensor, over: Over = "all") -> tuple[Tensor, Tensor]:
        """Ends of the range of each cluster of channels, ``[clusters]`` float32 each.

        Args:
            labels: ``[channels]`` int64.
            over: how samples become one range. ``"all"``: everything that was seen. ``"mean"``:
                the mean of their ends. ``"running"``: an average in which each new sample weighs
                `NEWEST`, as in RPTQ's published code.
        """
        shape = (len(self.lows), int(labels.max()) + 1)
        places = labels.expand(len(self.lows), -1)
        low = torch.empty(shape).scatter_reduce(1, places, self.lows, "amin", include_self=False)
        high = torch.empty(shape).scatter_reduce(1, places, self.highs, "amax", include_self=False)
        if over == "all":
            return low.amin(0), high.amax(0)
        if over == "mean":
            return low.mean(0), high.mean(0)
        return _running(low), _running(high)

    def surprises(self) -> tuple[Tensor, Tensor]:
        """How far each sample goes below and above all others, channel by channel.

        They tell how far a range that calibration found will be exceeded by other text.

        Returns:
            ``[samples, channels]`` float32 each, not negative; zeros for a single sample.
        """
        return _lead(-self.lows), _lead(self.highs)


def _lead(samples: Tensor) -> Tensor:
    """By how much each of ``[samples, n]`` is larger than all others; zero where it is not."""
    lead = torch.zeros_like(samples)
    if len(samples) > 1:
        (first, second), (where, _) = samples.topk(2, dim=0)
        lead.scatter_(0, where.unsqueeze(0), (first - second).unsqueeze(0))
    return lead


def _running(samples: Tensor) -> Tensor:
    """The running average of ``[samples, n]``, from the first on."""
    average = samples[0].clone()
    for sample in samples[1:]:
        average.lerp_(sample, NEWEST)
    return average


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add ``x.T @ x`` to ``total``.

    Args:
        total: ``[in, in]`` float32, symmetric.
        x: ``[tokens, in]`` float; products are of float32.
    """
    rows = x.float()
    # The product is symmetric: only panels on and right of the diagonal are multiplied.
    for start in range(0, rows.shape[1], PANEL):
        stop = start + PANEL
        product = rows[:, start:stop].T @ rows[:, start:]
        total[start:stop, start:] += product
        total[stop:, start:stop] += product[:, PANEL:].T


def factorize(hessian: Tensor, damp: float, order: Tensor) -> Factor:
    """Factor ``inverse(H + damp * mean(diag H) * I)`` as ``U.T @ U``.

    Inputs that were never active get the mean diagonal: they are then rounded to nearest, which
    is the best guess where calibration says nothing. When the factorization fails, damping grows
    tenfold, up to the mean diagonal itself.

    Args:
        hessian: ``[in, in]`` float32, symmetric.
        damp: share of the mean diagonal added to the diagonal, positive.
        order: ``[in]`` int64: position ``j`` of the factor is input ``order[j]``.

    Raises:
        SolverError: no damping up to 1.0 makes it positive definite, or it is not finite.
    """
    if not is_finite(hessian):
        raise SolverError("the calibration inputs overflow: the Hessian is not finite")
    used = damp
    while True:
        upper = _inverse_factor(_normalized(hessian, order, used))
        if upper is not None:
            return Factor(upper, order, used)
        if used >= 1.0:
            raise SolverError(
                f"the Hessian is not positive definite with damping {used:g}: use more samples"
            )
        used = min(used * 10, 1.0)


def _normalized(hessian: Tensor, order: Tensor, damp: float) -> Tensor:
    """An ordered, damped copy with mean diagonal 1 (before damping): its scale cancels later."""
    # Symmetric, so gathering rows twice orders both axes; rows are the faster ones.
    matrix = hessian[order].T.contiguous()[order].div_(hessian.diagonal().mean().item() or 1.0)
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal.add_(damp)
    return matrix


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    """``U`` with ``inverse(matrix) = U.T @ U``, in place of ``matrix``; ``None`` if there is none.

    With ``matrix = R @ R.T``, ``R`` upper triangular, it is ``inverse(R)``: one factorization from
    the last row to the first, without the inverse of ``matrix`` and its rounding errors.
    """
    found = _invert_upper(matrix)
    return matrix if found and is_finite(matrix) else None


def is_finite(matrix: Tensor) -> bool:
    """Whether every value of ``matrix`` is finite: one pass, and no other tensor."""
    low, high = matrix.aminmax()  # not a number if one is none
    return math.isfinite(low) and math.isfinite(high)


def _invert_upper(matrix: Tensor) -> bool:
    """Replace ``matrix = R @ R.T`` by ``inverse(R)``, halving it so that products do the work."""
    size = len(matrix)
    if size <= LEAF:
        lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if failed:
            return False
        matrix.copy_(torch.linalg.solve_triangular(lower, torch.eye(size), upper=False).flip(0, 1))
        return True
    half = size // 2
    first, corner, last = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    if not _invert_upper(last):
        return False
    beside = corner @ last.T  # of R
    first.addmm_(beside, beside.T, alpha=-1)
    if not _invert_upper(first):
        return False
    torch.mm(first, (beside @ last).neg_(), out=corner)
    matrix[half:, :half] = 0.0
    return True
