"""What a matrix can take off the errors that the outputs of its block have anyway.

The hidden states of a quantized model differ from those of the float model, and part of that error
follows from what the matrix reads: ``e = -change @ x`` in the least squares sense, over tokens.
Where the matrix writes to hidden states, its weight plus ``change`` takes that part off. That is
the same regression by which GPTAQ (arXiv 2504.02692) and QEP (arXiv 2504.09629) let a matrix make
up for errors of its input, here of all that the block puts out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

RIDGES: Final = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Shares of the mean square of the inputs that may be added to each of their squares: the more of
the errors is chance, as it is of little text and after many matrices, the larger is best."""
LOUD: Final = 10.0
"""How much louder than the median of its segment a token is, at least, that counts as loud."""


def is_loud(hidden: Tensor) -> Tensor:
    """Whether each token of ``hidden`` ``[..., tokens, width]`` is loud, ``[..., tokens]`` bool.

    Such as the first of a text may be a thousand times as loud as others (massive activations,
    arXiv 2402.17762). Their errors are large, and mean little to what divides by that loudness.
    """
    squares = hidden.square().mean(-1)
    return squares > LOUD**2 * squares.median(-1, keepdim=True).values


def trust(errors: Tensor, loud: Tensor) -> Tensor:
    """How much each token counts in a regression of ``errors``: the less, the larger its error.

    Squared errors of tokens differ by orders of magnitude, so a few would decide what is fitted,
    and say little of other text. Each counts by ``1 / (1 + s / m)``, where ``s`` is its squared
    error and ``m`` the median of its segment (weights of Cauchy's robust regression).

    Args:
        errors: ``[..., tokens, width]``.
        loud: ``[..., tokens]``, tokens that do not count.

    Returns:
        ``[..., tokens]``, from 0 to 1.
    """
    squares = errors.square().mean(-1)
    usual = squares.masked_fill(loud, math.nan).nanmedian(-1, keepdim=True).values
    counts = torch.where(squares > 0, usual / (usual + squares), 1.0)
    return counts.masked_fill(loud, 0.0)


class ErrorFit:
    """Regression of errors of a block's outputs on the inputs of a matrix.

    Args:
        out_features: number of outputs of the matrix, and width of hidden states.
        in_features: number of its inputs.
        add_gram: adds ``rows.T @ rows`` to a matrix in place, as `quantine.kernels.gram.add_gram`
            does.
        device: where sums are kept; must be that of the inputs.

    Attributes:
        squared: sum of the squared errors, as tokens count.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        add_gram: Callable[[Tensor, Tensor], None],
        device: torch.device,
    ) -> None:
        self._add_gram = add_gram
        self._inputs = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._errors = torch.zeros(out_features, in_features, dtype=torch.float32, device=device)
        self._energy = torch.zeros((), dtype=torch.float32, device=device)
        self.squared = 0.0

    def update(self, x: Tensor, errors: Tensor, counts: Tensor, loud: Tensor) -> None:
        """Add some tokens.

        Args:
            x: inputs of the matrix, ``[tokens, in]`` float32 or bfloat16.
            errors: of the block's outputs, ``[tokens, out]`` float32.
            counts: how much each token counts, ``[tokens]``, see `trust`.
            loud: tokens ``[tokens]`` that count fully as tokens without an error, so that a change
                adds little to what they get.
        """
        root = counts.masked_fill(loud, 1.0).sqrt().unsqueeze(1)
        rows = (x.float() * root).to(x.dtype)
        self._add_gram(self._inputs, rows)
        self._energy += rows[~loud].float().square().mean(-1).sum()
        wrong = (errors * root).masked_fill(loud.unsqueeze(1), 0.0)
        self._errors.addmm_(wrong.mT, rows.float())
        self.squared += float(wrong.square().sum())

    def change(self, ridge: float) -> Tensor | None:
        """What to add to the weight, ``[out, in]`` float32; ``None`` if the sums have no factor.

        Args:
            ridge: one of `RIDGES`.
        """
        damped = self._inputs.clone()
        damped.diagonal().add_(ridge * self._energy)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) or not bool(self._errors.isfinite().all()):
            return None
        return torch.cholesky_solve(self._errors.mT, factor).mT.neg()

    def taken_off(self, change: Tensor) -> float:
        """By how much ``change`` lowers the squared errors of these tokens, as they count.

        Blocks are taken to add what the matrix puts out.
        """
        return -float((change * (2 * self._errors + change @ self._inputs)).sum())
