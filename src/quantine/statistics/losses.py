"""How much an output changes when a matrix is quantized or a grid is replaced."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantine.core.device import for_float64


class RelativeLoss:
    """Sum of squared changes of an output over its sum of squares before the change.

    Attributes:
        change: sum of squared differences so far.
        total: sum of squares before the change so far.
    """

    def __init__(self) -> None:
        self.change = 0.0
        self.total = 0.0

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add outputs of one shape, before and after the change."""
        self.change += _sum((after.float() - before.float()).square())
        self.total += _sum(before.float().square())

    def merge(self, other: RelativeLoss) -> None:
        """Add all that ``other`` has seen, of other tokens."""
        self.change += other.change
        self.total += other.total

    @property
    def value(self) -> float:
        """The loss over all outputs added so far; 0 is no change."""
        return self.change / max(self.total, 1e-30)


class TokenLoss:
    """The relative squared change of each token's output, averaged over tokens.

    In many models one token, such as the first, is a thousand times larger than the others and
    would decide `RelativeLoss` alone, although the norm that comes next makes all tokens alike.
    Here every token counts the same.
    """

    def __init__(self) -> None:
        self._of_tokens: list[Tensor] = []

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add outputs ``[..., width]`` of one shape, before and after the change."""
        change = (after.float() - before.float()).square().sum(-1)
        change /= before.float().square().sum(-1).clamp(min=1e-30)
        self._of_tokens.append(change.flatten())

    def merge(self, other: TokenLoss) -> None:
        """Add all that ``other`` has seen; its tokens come after those of this one."""
        self._of_tokens += other._of_tokens

    @property
    def value(self) -> float:
        """The mean loss over all tokens added so far; 0 is no change."""
        return float(for_float64(torch.cat(self._of_tokens)).mean(dtype=torch.float64))


def _sum(values: Tensor) -> float:
    return float(for_float64(values).sum(dtype=torch.float64))


def relative_loss(before: Sequence[Tensor], after: Sequence[Tensor]) -> RelativeLoss:
    """The `RelativeLoss` between outputs before and after a change, one tensor per batch."""
    loss = RelativeLoss()
    for pair in zip(before, after, strict=True):
        loss.update(*pair)
    return loss


def token_loss(before: Sequence[Tensor], after: Sequence[Tensor]) -> TokenLoss:
    """The `TokenLoss` between outputs ``[..., width]`` before and after a change, one per batch."""
    loss = TokenLoss()
    for pair in zip(before, after, strict=True):
        loss.update(*pair)
    return loss
