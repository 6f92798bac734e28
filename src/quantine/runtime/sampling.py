"""Choosing a token from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantine.errors import PlanError
from quantine.runtime.decoder import most_likely

COLDEST: Final = 0.01
"""Smallest temperature other than zero; below it probabilities would overflow."""
SEEDS: Final = 2**63
"""Seeds are below."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults always take the most likely one.

    Attributes:
        temperature: divisor of logits; 0 always takes the most likely token.
        top_p: tokens are drawn from the fewest most likely ones whose probabilities sum to at
            least this; 1 draws from all.
        seed: of a random generator of its own.

    Raises:
        PlanError: a value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not COLDEST <= self.temperature < float("inf"):
            raise PlanError(f"temperature must be 0 or at least {COLDEST}, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise PlanError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.seed < SEEDS:
            raise PlanError(f"seed must be in 64 bits and not negative, not {self.seed}")


class Sampler:
    """Chooses one token after another.

    Args:
        sampling: how.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator("cpu").manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> int:
        """A token id.

        Args:
            logits: ``[vocabulary]`` float32, on the CPU.
        """
        if self._sampling.temperature == 0:
            return most_likely(logits)
        probabilities = (logits / self._sampling.temperature).softmax(-1)
        if self._sampling.top_p < 1:
            probabilities = _nucleus(probabilities, self._sampling.top_p)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def _nucleus(probabilities: Tensor, share: float) -> Tensor:
    """``probabilities`` with zeros for all but the most likely that sum to at least ``share``."""
    ordered, places = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    # The first stays, however small the share is: in float32 it may be 0.
    kept = ordered.masked_fill((before >= share) & (before > 0), 0)
    return torch.zeros_like(probabilities).scatter_(0, places, kept)
