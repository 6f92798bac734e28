"""How much an output changes when a matrix or a grid does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RelativeLoss:
    """Squared difference of outputs relative to their square before.

    Attributes:
        change: sum of squared differences so far.
        total: sum of squares before.
    """

    def __init__(self) -> None:
        self.change = 0.0
        self.total = 0.0

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add outputs of one shape, before and after the change."""
        difference = (after.float() - before.float()).square()
        self.change += float(difference.sum(dtype=torch.float64))
        self.total += float(before.float().square().sum(dtype=torch.float64))

    def merge(self, other: RelativeLoss) -> None:
        """Add what ``other`` has seen, of other tokens."""
        self.change += other.change
        self.total += other.total

    @property
    def value(self) -> float:
        """The loss of everything seen."""
        return self.change / max(self.total, 1e-30)


class TokenLoss:
    """Mean over tokens of the squared difference of outputs relative to a token's square before.

    Unlike `RelativeLoss` it is not about the one token that is a thousand times louder than the
    others, as the first one is in many models: the norm that comes next makes all alike.
    """

    def __init__(self) -> None:
        self._of_tokens: list[Tensor] = []

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add outputs ``[..., width]`` of one shape, before and after the change."""
        change = (after.float() - before.float()).square().sum(-1)
        change /= before.float().square().sum(-1).clamp(min=1e-30)
        self._of_tokens.append(change.flatten())

    def merge(self, other: TokenLoss) -> None:
        """Add what ``other`` has seen; its tokens come after these."""
        self._of_tokens += other._of_tokens

    @property
    def value(self) -> float:
        """The loss of everything seen."""
        return float(torch.cat(self._of_tokens).mean(dtype=torch.float64))


def relative_loss(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """`RelativeLoss` of outputs, a pair for each batch."""
    loss = RelativeLoss()
    for pair in zip(before, after, strict=True):
        loss.update(*pair)
    return loss.value


def token_loss(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """`TokenLoss` of outputs, a pair for each batch."""
    loss = TokenLoss()
    for pair in zip(before, after, strict=True):
        loss.update(*pair)
    return loss.value
