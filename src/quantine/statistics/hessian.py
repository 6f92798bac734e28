"""The Hessian that error feedback runs on: second moments of a matrix's input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from quantine.core.device import for_float64
from quantine.core.stage_times import StageTimes
from quantine.statistics.inverse_factor import InverseFactor, factor_diagonal, factorize

ENERGY_ROWS: Final = 512
"""Number of outputs whose error is computed at once."""
ENERGY_COLUMNS: Final = 192
"""Number of inputs that are multiplied at once with those after them."""


class Hessian:
    """Sum of ``x x.T`` over the tokens of one input, which several matrices may share.

    Every token counts: calibration segments are cut from a stream of text at full length, so there
    is no padding to mask out. Tokens may have weights, see `quantine.calibrate.loss_weights`.

    Args:
        in_features: length of ``x``.
        add_gram: adds ``rows.T @ rows`` to a matrix in place, as `quantine.kernels.gram.add_gram`
            does.
        device: where the sum is kept; must be that of the inputs.
        times: is told what sums and factors take, as stages ``Hessians`` and ``factorization``.

    Attributes:
        matrix: ``[in, in]`` float32, the sum; not divided by the number of tokens.
        tokens: number of tokens.
        borrowed: how many of these are means of others', see `borrow`.
        coupling: how outputs of the one matrix that reads the input make up for each other, see
            `quantine.statistics.output_covariance.OutputCovariance`; ``None`` if they do not.
    """

    def __init__(
        self,
        in_features: int,
        add_gram: Callable[[Tensor, Tensor], None],
        device: torch.device | str = "cpu",
        times: StageTimes | None = None,
    ) -> None:
        self._add_gram = add_gram
        self._times = times or StageTimes()
        self.matrix = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = 0
        self.borrowed = 0
        self.coupling: Tensor | None = None
        self._factor: InverseFactor | None = None
        self._damp: float | None = None
        self._spread: tuple[float, Tensor, Tensor] | None = None  # damping, order, what is found

    @classmethod
    def of(
        cls,
        matrix: Tensor,
        tokens: int,
        add_gram: Callable[[Tensor, Tensor], None],
        times: StageTimes | None = None,
    ) -> Hessian:
        """The Hessian of ``tokens`` tokens whose sum is ``matrix``, which it takes over."""
        hessian = cls(0, add_gram, matrix.device, times)
        hessian.matrix, hessian.tokens = matrix, tokens
        return hessian

    def update(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add the inputs of some tokens.

        Args:
            x: the inputs, ``[..., in]``, ``tokens`` rows in all.
            weights: how much each token counts, ``[tokens]`` float32, on average 1 over all tokens
                of the calibration; ``None`` counts all alike.
        """
        rows = x.reshape(-1, x.shape[-1])
        if weights is not None:
            rows = (rows.float() * weights.sqrt().unsqueeze(1)).to(x.dtype)
        with self._times.stage("Hessians"):
            self._add_gram(self.matrix, rows)
        self.tokens += rows.shape[0]
        self._factor = self._spread = None

    def merge(self, other: Hessian) -> None:
        """Add all that ``other`` has seen, of other tokens of the same input."""
        self.matrix += other.matrix
        self.tokens += other.tokens
        self.borrowed += other.borrowed
        self._factor = self._spread = None

    def borrow(self, mean: Tensor, tokens: int) -> None:
        """Add ``tokens`` tokens that are like the mean of others.

        The sum, divided by the number of tokens, so shrinks towards ``mean``.

        Args:
            mean: ``[in, in]`` float32, the mean of ``x x.T``.
            tokens: their number.
        """
        self.matrix += mean * tokens
        self.tokens += tokens
        self.borrowed += tokens
        self._factor = self._spread = None

    @property
    def damp_used(self) -> float | None:
        """Damping that the last factorization used; ``None`` if the sum was not factored since."""
        return None if self._factor is None else self._factor.damp

    def factor(self, damp: float, order: Tensor) -> InverseFactor:
        """The triangular factor of the inverse of the damped Hessian.

        The last factor is kept, so that matrices which share an input also share the factorization.

        Args:
            damp: damping as a share of the mean diagonal, positive.
            order: ``[in]`` int64: position ``j`` of the factor is input ``order[j]``.

        Raises:
            SolverError: the Hessian cannot be factored, see `factorize`.
        """
        kept = self._factor
        if kept is None or self._damp != damp or not torch.equal(kept.order, order):
            with self._times.stage("factorization"):
                self._factor = kept = factorize(self.matrix, damp, order)
            self._damp = damp
        return kept

    def spread(self, damp: float, order: Tensor) -> Tensor:
        """The diagonal ``[in]`` of the result of `factor`, without the factor, for predictions.

        The last one is kept, as the factor is. Arguments and errors are those of `factor`.
        """
        kept = self._spread
        if kept is None or kept[0] != damp or not torch.equal(kept[1], order):
            with self._times.stage("factorization"):
                self._spread = kept = damp, order, factor_diagonal(self.matrix, damp, order)
        return kept[2]

    def inverse_diagonal(self) -> Tensor | None:
        """Diagonal of the inverse of the damped mean of ``x x.T``, from the last factorization.

        Returns:
            ``[in]`` float32 in input order; infinite for inputs that were never active, as no error
            there reaches the output. ``None`` if there is no factorization of the present sum.
        """
        factor = self._factor
        if factor is None:
            return None
        diagonal = self.matrix.diagonal()
        # The squared norm of each column of U, which belongs to H in units of its mean diagonal.
        ordered = torch.linalg.vector_norm(factor.upper, dim=0).square_()
        inverse = torch.empty_like(ordered)
        inverse[factor.order] = ordered * (self.tokens / (diagonal.mean().item() or 1.0))
        return inverse.masked_fill_(diagonal == 0, math.inf)

    def error_energy(self, delta: Tensor) -> float:
        """Squared output error of a weight change, summed over tokens: ``tr(delta H delta.T)``.

        Args:
            delta: the change, ``[out, in]`` float32.
        """
        low, high = delta.aminmax()
        largest = float(torch.maximum(-low, high))
        if not 0 < largest < math.inf:
            return 0.0 if largest == 0 else math.nan
        energies = []
        for rows in delta.split(ENERGY_ROWS):  # more would take memory, and are not faster
            unit = rows / largest  # squares of small changes would be zero in float32
            for start in range(0, unit.shape[1], ENERGY_COLUMNS):
                products = self._with_later_inputs(unit, start)
                energies.append(for_float64(products).sum(dtype=torch.float64))
        return float(torch.stack(energies).sum()) * largest**2

    def _with_later_inputs(self, unit: Tensor, start: int) -> Tensor:
        """What some columns of ``unit`` add to the energy, with those after them counted twice.

        As the matrix is symmetric, that saves almost half of the products.

        Args:
            unit: ``[rows, in]``.
            start: the first of `ENERGY_COLUMNS` columns.

        Returns:
            ``[rows, columns]``, the summands.
        """
        end = min(start + ENERGY_COLUMNS, unit.shape[1])
        columns = unit[:, start:end]
        products = columns @ self.matrix[start:end, start:end]
        products.addmm_(unit[:, end:], self.matrix[end:, start:end], alpha=2)
        return products.mul_(columns)
