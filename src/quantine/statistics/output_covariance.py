"""How the errors of a matrix's outputs act together on a model's predictions.

A change ``dW`` of a matrix changes the predictions by about ``tr(G dW H dW.T) / 2``, with ``H`` the
second moments of its inputs and ``G`` those of the gradients with respect to its outputs, if the
two are taken as independent (the Kronecker factors of YAQA, arXiv 2505.22988). Where ``G = L D
L.T`` with ``L`` unit lower triangular, the errors ``e`` of one column cost ``sum_k D[k] * (e[k] +
sum over i > k of L[i, k] * e[i])**2``. So rows are rounded from the last to the first, and each
makes up for those after it, as columns do for those before them in GPTQ's loop.

A token counts by the square root of its mean squared gradient, as in
`quantine.calibrate.loss_weights`: the other half of its weight is in ``H``.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

RUN: Final = 768
"""Most outputs that make up for each other; a matrix with more has several runs, independent of
one another."""
UNIT: Final = 64
"""Runs of a matrix that has several are a multiple of this, so that threads can share them."""
DAMP: Final = 0.3
"""Share of the mean diagonal of ``G`` that is added to its diagonal: it is of few tokens."""


class OutputCovariance:
    """Second moments of the gradients with respect to a matrix's outputs, in runs of outputs.

    Attributes:
        sums: ``[runs, run, run]`` float32, with zeros where the last run is shorter; ``None``
            before the first token.
        outputs: number of outputs.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.outputs = 0

    def update(self, gradient: Tensor) -> None:
        """Add the gradients ``[..., out]`` of some tokens."""
        rows = gradient.float().flatten(0, -2)
        level = rows.square().mean(-1, keepdim=True)
        rows = rows * torch.where(level > 0, level, 1.0).pow(-0.25)
        self.outputs = rows.shape[1]
        run = run_of(self.outputs)
        missing = -self.outputs % run
        runs = torch.nn.functional.pad(rows, (0, missing)).unflatten(1, (-1, run)).movedim(1, 0)
        if self.sums is None:
            self.sums = rows.new_zeros(len(runs), run, run)
        self.sums.baddbmm_(runs.mT, runs)

    def coupling(self) -> Tensor:
        """What an error of each output asks of those before it in its run, and its ``D``.

        Returns:
            ``[out, run]`` float32: row ``i`` holds ``L[i, k]`` of the damped ``G`` for outputs
            ``k`` of its run before it, then ``D[i]``, then zeros. There must be at least one token,
            and gradients must be finite.
        """
        assert self.sums is not None
        diagonal = self.sums.diagonal(0, 1, 2)
        level = float(diagonal.sum() / self.outputs)
        damped = self.sums / (level or 1.0)
        damped.diagonal(0, 1, 2).add_(DAMP)
        return _unit_factor(damped)[: self.outputs].contiguous()


def reordered(coupling: Tensor, order: Tensor) -> Tensor:
    """What errors of outputs ask of each other after the outputs were put into another order.

    Outputs that share a run only afterwards do not make up for each other: how they act together is
    not known.

    Args:
        coupling: as `OutputCovariance.coupling` gives it, ``[out, run]``, on any device.
        order: ``[out]`` int64: place ``j`` gets output ``order[j]``.

    Returns:
        The same of the outputs in that order, ``[out, run]`` float32.
    """
    outputs, run = coupling.shape
    missing = -outputs % run
    moments = _moments(coupling)
    places = torch.nn.functional.pad(order, (0, missing))
    places[outputs:] = torch.arange(outputs, outputs + missing, device=order.device)
    of, inside = places.view(-1, run) // run, places.view(-1, run) % run
    moved = moments[of.unsqueeze(2), inside.unsqueeze(2), inside.unsqueeze(1)]
    moved.mul_(of.unsqueeze(2) == of.unsqueeze(1))
    return _unit_factor(moved)[:outputs].contiguous()


def turned(coupling: Tensor, turn: Tensor) -> Tensor:
    """What errors of outputs ask of each other after the outputs were turned.

    Outputs that share a run only afterwards do not make up for each other, as with `reordered`.

    Args:
        coupling: as there, on the CPU.
        turn: ``[out, out]`` float32: an orthogonal matrix that outputs are multiplied with from the
            right.

    Returns:
        The same of the turned outputs, ``[out, run]`` float32.
    """
    outputs, run = coupling.shape
    moments, missing = _moments(coupling), -outputs % run
    padded = torch.nn.functional.pad(turn, (0, missing, 0, missing))
    padded.diagonal()[outputs:] = 1.0
    parts = padded.unflatten(0, (-1, run)).unflatten(2, (-1, run)).movedim(2, 1)  # from run, to run
    moved = torch.stack([(part.mT @ moments @ part).sum(0) for part in parts.unbind(1)])
    return _unit_factor(moved)[:outputs].contiguous()


def _moments(coupling: Tensor) -> Tensor:
    """The damped second moments that `OutputCovariance.coupling` came from.

    ``[runs, run, run]`` float32; outputs that the last run lacks have 1 on the diagonal.
    """
    outputs, run = coupling.shape
    missing = -outputs % run
    runs = torch.nn.functional.pad(coupling.float(), (0, 0, 0, missing)).unflatten(0, (-1, run))
    costs = runs.diagonal(0, 1, 2).clone()
    costs.flatten()[outputs:] = 1.0
    lower = runs.tril(-1)
    lower.diagonal(0, 1, 2).fill_(1.0)
    found: Tensor = (lower * costs.unsqueeze(1)) @ lower.mT
    return found


def _unit_factor(moments: Tensor) -> Tensor:
    """``L`` of ``moments`` ``[runs, run, run]`` below the diagonal and ``D`` on it, runs joined."""
    lower = torch.linalg.cholesky(moments)
    roots = lower.diagonal(0, 1, 2)
    unit: Tensor = (lower / roots.unsqueeze(1)).tril_(-1)
    unit.diagonal(0, 1, 2).copy_(roots.square())
    return unit.flatten(0, 1)


def run_of(outputs: int) -> int:
    """Number of outputs of a run, of a matrix that has ``outputs``; the last one may be shorter."""
    if outputs <= RUN:
        return outputs
    even = -(-outputs // -(-outputs // RUN))
    return -(-even // UNIT) * UNIT
