"""Squared gradients of a model's predictions with respect to the outputs of its matrices.

For a small change ``dy`` of an output, the Kullback-Leibler divergence between the model's
predictions before and after is about ``(g @ dy)**2 / 2``, with ``g`` the gradient of the
log-likelihood of a token drawn from the prediction (the Fisher information). If changes of
different outputs are taken as independent, the squared change of output ``r`` is weighted by the
mean of ``g[r]**2``.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SquaredGradients:
    """Sums over tokens of the squared gradient of each output of a matrix.

    Attributes:
        sums: ``[out]`` float32; ``None`` before the first token.
        tokens: number of tokens.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.tokens = 0

    def update(self, gradient: Tensor) -> None:
        """Add the gradients ``[..., out]`` of some tokens."""
        rows = gradient.float().flatten(0, -2)
        self._add(rows.square().sum(0), len(rows))

    def merge(self, other: SquaredGradients) -> None:
        """Add all that ``other`` has seen, of other tokens for the same matrix."""
        if other.sums is not None:
            self._add(other.sums, other.tokens)

    def mean(self, tokens: int | None = None) -> Tensor:
        """The mean over tokens, ``[out]`` float32; there must be at least one token.

        Args:
            tokens: number of tokens of the text, those that the matrix never saw included, whose
                gradients are zero; ``None`` is `tokens`.
        """
        assert self.sums is not None
        return self.sums / (self.tokens if tokens is None else tokens)

    def _add(self, sums: Tensor, tokens: int) -> None:
        self.sums = sums if self.sums is None else self.sums + sums
        self.tokens += tokens


class TokenGradients:
    """The mean over a matrix's outputs of their squared gradients, of each token on its own."""

    def __init__(self) -> None:
        self._of_tokens: list[Tensor] = []

    def update(self, gradient: Tensor) -> None:
        """Add the gradients ``[..., out]`` of some tokens."""
        self._of_tokens.append(gradient.float().flatten(0, -2).square().mean(-1))

    def means(self) -> Tensor:
        """The means, ``[tokens]`` float32, in the order in which tokens were added."""
        return torch.cat(self._of_tokens)
