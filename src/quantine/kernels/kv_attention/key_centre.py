"""What keys differ little from: a vector for each head that turns with the position of the token.

Rotary embeddings turn pairs of channels by angles that grow with the position. The mean of keys
before that, which biases of some models make large, becomes a wave in every channel, and a static
grid would have to hold all of it. Packed keys are less this centre. Products of queries with it are
added to scores: they are products with few numbers for each position, which heads share.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.core.ambient import without_autocast

ROOM: Final = 256
"""Least number of positions in a table of waves."""


class Waves:
    """Cosines and sines of angles by position, for as many positions as were asked for.

    Args:
        turns: ``[n]`` float32, radians from one position to the next.
    """

    def __init__(self, turns: Tensor) -> None:
        self.turns = turns
        self._table = turns.new_empty(0, 2 * len(turns))

    def until(self, positions: int) -> Tensor:
        """``[positions, 2 * n]`` float32: all cosines, then all sines."""
        if len(self._table) < positions:
            room = max(ROOM, 2 * len(self._table), positions)
            angles = torch.arange(room, device=self.turns.device).unsqueeze(1) * self.turns
            self._table = torch.cat([angles.cos(), angles.sin()], 1)
        return self._table[:positions]


class KeyCentre:
    """The centre of the keys of a block, head by head.

    At position ``p > 0`` it is ``wave[0] * cos(turns * p) + wave[1] * sin(turns * p)``. The first
    token of a text, which attention treats like no other, has its own.

    Args:
        first: ``[heads, dim]`` float32, the centre at position 0.
        wave: ``[2, heads, dim]`` float32.
        turns: ``[dim]`` float32, radians from one position to the next, the same in all heads.
    """

    def __init__(self, first: Tensor, wave: Tensor, turns: Tensor) -> None:
        self.first, self.wave, self.turns = first, wave, turns
        self._waves: Waves | None = None
        self._folds: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of what the centre is stored as."""
        return self.first.nbytes + self.wave.nbytes + len(self.first) * self.turns.nbytes

    def share(self, other: KeyCentre) -> bool:
        """Use the table of ``other``, so that blocks do not have one each; whether both turn alike.

        A centre that turns otherwise keeps its own.
        """
        there = self.turns.device == other.turns.device
        alike = there and torch.equal(self.turns, other.turns)
        if alike:
            self._waves = other.waves()
        return alike

    def waves(self) -> Waves:
        """The cosines and sines of all angles that some channel turns by."""
        if self._waves is None:
            self._waves = Waves(self.turns.unique())
        return self._waves

    def at(self, positions: Tensor) -> Tensor:
        """The centre of keys at ``positions`` ``[...]``, as ``[..., heads, dim]`` float32."""
        with without_autocast(self.turns.device):
            angles = positions[..., None, None].float() * self.turns
            centre = self.wave[0] * angles.cos() + self.wave[1] * angles.sin()
            return torch.where((positions == 0)[..., None, None], self.first, centre)

    def products(self, query: Tensor, context: int) -> Tensor:
        """Products of queries with the centres at the first ``context`` positions.

        Args:
            query: ``[batch, heads, tokens, dim]`` float32; its heads are a multiple of those of
                keys.
            context: number of positions.

        Returns:
            ``[batch, heads, tokens, context]`` float32.
        """
        batch, heads, tokens, dim = query.shape
        with without_autocast(query.device):
            groups = heads // len(self.first)
            rows = query.reshape(batch, len(self.first), groups * tokens, dim)
            folded = rows @ self._folded()
            found = folded @ self.waves().until(context).T
            if context:
                found[..., 0] = (rows @ self.first.unsqueeze(2)).squeeze(3)
        return found.view(batch, heads, tokens, context)

    def _folded(self) -> Tensor:
        """``[heads, dim, 2 * n]``: what a channel of a query gives to each cosine and sine."""
        if self._folds is None:
            turns = self.waves().turns
            own = (self.turns.unsqueeze(1) == turns).float()
            self._folds = torch.cat([part.unsqueeze(2) * own for part in self.wave], 2)
        return self._folds
