"""What a matrix can take off the errors that the outputs of its block have anyway.

The hidden states of a quantized model differ from those of the float model, and part of that error
follows from what the matrix reads: ``e = -change @ x`` in the least squares sense, over tokens.
Where the matrix writes to hidden states, its weight plus ``change`` takes that part off. That is
the same regression by which GPTAQ (arXiv 2504.02692) and QEP (arXiv 2504.09629) let a matrix make
up for errors of its input, here of all that the block puts out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

RIDGE: Final = 0.3
"""Share of the mean square of the inputs that is added to each of their squares."""
LOUD: Final = 10.0
"""How much louder than the median of its segment a token is, at least, that counts as loud."""


def is_loud(hidden: Tensor) -> Tensor:
    """Whether each token of ``hidden`` ``[..., tokens, width]`` is loud, ``[..., tokens]`` bool.

    Such as the first of a text may be a thousand times as loud as others (massive activations,
    arXiv 2402.17762). Their errors are large, and mean little to what divides by that loudness.
    """
    squares = hidden.square().mean(-1)
    return squares > LOUD**2 * squares.median(-1, keepdim=True).values


class ErrorFit:
    """Regression of errors of a block's outputs on the inputs of a matrix.

    Args:
        out_features: number of outputs of the matrix, and width of hidden states.
        in_features: number of its inputs.
        add_gram: adds ``rows.T @ rows`` to a matrix in place, as `quantine.kernels.gram.add_gram`
            does.
        device: where sums are kept; must be that of the inputs.
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

    def update(self, x: Tensor, errors: Tensor, loud: Tensor) -> None:
        """Add some tokens.

        Args:
            x: inputs of the matrix, ``[tokens, in]`` float32 or bfloat16.
            errors: of the block's outputs, ``[tokens, out]`` float32.
            loud: tokens ``[tokens]`` whose errors are to stay as they are.
        """
        self._add_gram(self._inputs, x)
        self._energy += x[~loud].float().square().mean(-1).sum()
        self._errors.addmm_(errors.masked_fill(loud.unsqueeze(1), 0.0).mT, x.float())

    def change(self) -> Tensor | None:
        """What to add to the weight, ``[out, in]`` float32; ``None`` if the sums have no factor."""
        damped = self._inputs.clone()
        damped.diagonal().add_(RIDGE * self._energy)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) or not bool(self._errors.isfinite().all()):
            return None
        return torch.cholesky_solve(self._errors.mT, factor).mT.neg()
