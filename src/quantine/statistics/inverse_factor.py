"""The triangular factor of the inverse Hessian, which error feedback runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantine.core.finite import is_finite
from quantine.errors import SolverError


@dataclass(frozen=True)
class InverseFactor:
    """The triangular factor of a damped inverse Hessian (GPTQ, arXiv 2210.17323, section 3).

    Attributes:
        upper: ``[in, in]`` float32 upper triangular ``U`` with ``inverse(H) = U.T @ U``, rows and
            columns in the order of ``order``. ``H`` is damped and in units of its mean diagonal.
        order: ``[in]`` int64: position ``j`` is input ``order[j]``.
        damp: share of the mean diagonal that was really added to the diagonal of ``H``.
        coupling: how outputs make up for each other, see
            `quantine.statistics.output_covariance.OutputCovariance`; ``None`` if they do not.
    """

    upper: Tensor
    order: Tensor
    damp: float
    coupling: Tensor | None = None


LEAF: Final = 128
"""Largest size of a matrix that is factored without halving it."""
STRIP: Final = 1024
"""Number of columns that are brought into order at once: other copies than the result are small."""


def factorize(hessian: Tensor, damp: float, order: Tensor) -> InverseFactor:
    """Factor ``inverse(H + damp * mean(diag H) * I)`` as ``U.T @ U``.

    Inputs that were never active get the mean diagonal: they are then rounded to nearest, which is
    the best guess where calibration says nothing. If the factorization fails, damping grows
    tenfold, up to the mean diagonal itself. ``H`` is first divided by its mean diagonal.

    Args:
        hessian: ``[in, in]`` float32, symmetric.
        damp: share of the mean diagonal that is added to the diagonal, positive.
        order: ``[in]`` int64: position ``j`` of the factor is input ``order[j]``.

    Raises:
        SolverError: the Hessian is not finite, or no damping up to 1.0 makes it positive definite.
    """
    upper, used = _first_definite(hessian, damp, order, invert_upper)
    return InverseFactor(upper, order, used)


def factor_diagonal(hessian: Tensor, damp: float, order: Tensor) -> Tensor:
    """The diagonal ``[in]`` of what `factorize` finds, to the bit, in about half of its time.

    Arguments and errors are those of `factorize`.
    """
    return _first_definite(hessian, damp, order, _invert_diagonal)[0].diagonal().clone()


def _first_definite(
    hessian: Tensor,
    damp: float,
    order: Tensor,
    invert: Callable[[Tensor, list[Tensor]], None],
) -> tuple[Tensor, float]:
    """What ``invert`` makes of the Hessian with the least damping that suffices, and that damping.

    Args:
        hessian, damp, order: see `factorize`.
        invert: changes the damped matrix in place, as `invert_upper` does.
    """
    if not is_finite(hessian):
        raise SolverError("the calibration inputs overflow: the Hessian is not finite")
    used = damp
    while True:
        matrix, failures = _normalized(hessian, order, used), list[Tensor]()
        invert(matrix, failures)
        if is_finite(matrix) and not bool(torch.stack(failures).any()):
            return matrix, used
        if used >= 1.0:
            raise SolverError(
                f"the Hessian is not positive definite with damping {used:g}: use more samples"
            )
        used = min(used * 10, 1.0)


def _normalized(hessian: Tensor, order: Tensor, damp: float) -> Tensor:
    """A copy of the Hessian, ordered, divided by its mean diagonal, and damped."""
    matrix, unit = torch.empty_like(hessian), hessian.diagonal().mean().item() or 1.0
    # Symmetric, so gathering rows twice orders both axes; rows are the faster ones.
    for start in range(0, len(order), STRIP):
        strip = hessian[order[start : start + STRIP]].T.contiguous()[order]
        torch.div(strip, unit, out=matrix[:, start : start + STRIP])
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal.add_(damp)
    return matrix


def invert_upper(matrix: Tensor, failures: list[Tensor]) -> None:
    """Replace ``matrix = R @ R.T``, ``R`` upper triangular, by ``U = inverse(R)``.

    So ``inverse(matrix) = U.T @ U``: one factorization from the last row to the first, without the
    inverse of ``matrix`` and its rounding errors. The matrix is halved again and again, so that
    most work is matrix products.

    Args:
        matrix: positive definite; else what replaces it means nothing.
        failures: is given a number for each leaf, which is not 0 if the leaf is not positive
            definite. They stay on the device: to ask for each would be to wait for it.
    """
    size = len(matrix)
    if size <= LEAF:
        lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        failures.append(failed)
        matrix.copy_(
            torch.linalg.solve_triangular(
                lower, torch.eye(size, dtype=matrix.dtype, device=matrix.device), upper=False
            ).flip(0, 1)
        )
        return
    half = size // 2
    first, corner, last = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    invert_upper(last, failures)
    beside = corner @ last.T  # the block of R beside its last
    first.addmm_(beside, beside.T, alpha=-1)
    invert_upper(first, failures)
    torch.mm(first, (beside @ last).neg_(), out=corner)
    matrix[half:, :half] = 0.0


def _invert_diagonal(matrix: Tensor, failures: list[Tensor]) -> None:
    """Do of `invert_upper` what the diagonal needs; what is elsewhere then means nothing."""
    if len(matrix) <= LEAF:
        invert_upper(matrix, failures)
        return
    half = len(matrix) // 2
    first, corner, last = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    invert_upper(last, failures)
    beside = corner @ last.T
    first.addmm_(beside, beside.T, alpha=-1)
    _invert_diagonal(first, failures)
