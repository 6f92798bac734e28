"""Codes of channels that have different numbers of bits, as rows of digits of the same size.

A row of a head has as many bits as if all its channels had the same number. Each channel has an
even number of them: its code is cut into digits of two bits, the lowest one first, and the digits
of all channels follow each other. A channel of 0 bits has no digit; its code is always 0.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

DIGIT: Final = 2
"""Number of bits of a digit."""


class Digits(NamedTuple):
    """Which digits the channels of each head have.

    Attributes:
        place: ``[heads, digits]`` int64, the channel of each digit.
        shift: ``[heads, digits]`` uint8, the number of bits of the code below it; 8 for digits that
            no channel has, which are 0.
        weight: ``[heads, digits]`` float32, what the digit is worth in the code: ``2**shift``, or 0
            where no channel has it.
    """

    place: Tensor
    shift: Tensor
    weight: Tensor

    @classmethod
    def of(cls, widths: Tensor, count: int) -> Digits:
        """The digits of channels with so many bits.

        Args:
            widths: ``[heads, dim]`` uint8, even numbers of bits from 0 to 8.
            count: number of digits of a head; those of its channels are not more.
        """
        digits = widths.long() // DIGIT
        ends = digits.cumsum(1)
        number = torch.arange(count, device=widths.device).expand(len(widths), -1).contiguous()
        place = torch.searchsorted(ends, number, right=True)
        within = place < widths.shape[1]
        place = torch.where(within, place, 0)
        shift = (number - (ends - digits).gather(1, place)) * DIGIT
        weight = torch.where(within, torch.exp2(shift.float()), 0.0)
        return cls(place, torch.where(within, shift, 8).byte(), weight)

    def split(self, codes: Tensor) -> Tensor:
        """The digits of ``codes`` ``[batch, heads, tokens, dim]``, uint8 like these."""
        shape = (*codes.shape[:3], self.place.shape[1])
        found = codes.gather(3, self.place[:, None].expand(shape)).int()
        return ((found >> self.shift[:, None].int()) & (2**DIGIT - 1)).byte()

    def joined(self, digits: Tensor, dim: int) -> Tensor:
        """The codes ``[batch, heads, tokens, dim]`` uint8 that ``digits`` are of."""
        shifted = digits.int() << self.shift[:, None].int()
        codes = shifted.new_zeros(*digits.shape[:3], dim)
        return codes.scatter_add_(3, self.place[:, None].expand(digits.shape), shifted).byte()
