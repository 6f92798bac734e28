"""`Rotation`: an orthogonal matrix of any width that spreads every channel over all others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from quantine.core.ambient import without_autocast
from quantine.core.device import CPU

LARGEST_FACTOR: Final = 64
"""Largest power of two that is multiplied as one matrix; larger ones are products of several."""
MIXING: Final = ((16, 0x7FEB352D), (15, 0x846CA68B))
"""Shifts and factors that mix the bits of a place; constants of a hash by C. Wellons."""
AT_ONCE: Final = 2**24
"""Numbers that are rotated at once, and so are in memory several times."""


@dataclass(frozen=True)
class Rotation:
    """A random orthogonal matrix Q ``[width, width]``, whose numbers are all about equally large.

    Q is a diagonal matrix of random signs times a Kronecker product of normalized Hadamard
    matrices, which exist for powers of two, and the Hartley transform of what is odd of the width.
    That is QuaRot's randomized Hadamard matrix (arXiv 2404.00456) for any width.

    Attributes:
        width: number of channels, at least 1.
        seed: of the signs; ``None`` for signs that files rely on, see `settled_signs`.
        keeps_ones: whether the vector of ones is rotated into itself, so that means over channels
            stay what they are. A reflection (Householder) behind the product sees to it.
    """

    width: int
    seed: int | None
    keeps_ones: bool = False

    def turned(self, x: Tensor) -> Tensor:
        """The product ``x Q`` of ``x`` ``[..., width]``, float32 on the device of ``x``."""
        rows = x.reshape(-1, self.width)
        made = torch.empty(rows.shape, dtype=torch.float32, device=x.device)
        step = max(1, AT_ONCE // self.width)
        with without_autocast(x.device):
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                made[part] = self._reflected(self._spread(rows[part].float()))
        return made.view(x.shape)

    def _spread(self, rows: Tensor) -> Tensor:
        """The product of ``rows`` ``[n, width]`` float32 and all of Q but the reflection."""
        signs, *factors = self.on(rows.device)
        spread = rows * signs
        for matrix in factors:
            # The axis that is multiplied goes last; after all of them, axes are in order again.
            axes = spread.view(len(rows), len(matrix), -1).transpose(1, 2)
            spread = (axes @ matrix).reshape(len(rows), -1)
        return spread

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The signs and the factors on ``device``, which are made and brought there once.

        Who needs `turned` to make the same calls each time calls this before.
        """
        if device not in self._placed:
            with torch.inference_mode(mode=False):  # they may be used where gradients are wanted
                self._placed[device] = tuple(t.to(device) for t in (self._signs, *self._factors))
        return self._placed[device]

    @cached_property
    def _placed(self) -> dict[torch.device, tuple[Tensor, ...]]:
        return {}

    def _reflected(self, rows: Tensor) -> Tensor:
        """``rows`` behind the reflection that takes the rotated ones back to ones."""
        normal = self._normal
        if normal is None:
            return rows
        normal = normal.to(rows.device)
        return rows.addmm_((rows @ normal).unsqueeze(1), normal.unsqueeze(0), alpha=-2)

    @cached_property
    def _signs(self) -> Tensor:
        if self.seed is None:
            return settled_signs(self.width)
        generator = torch.Generator("cpu").manual_seed(self.seed)
        bits = torch.randint(2, (self.width,), generator=generator, dtype=torch.int64, device=CPU)
        return (2 * bits - 1).float()

    @cached_property
    def _factors(self) -> tuple[Tensor, ...]:
        """The matrices whose Kronecker product Q is but for signs and reflection, float32."""
        odd, power = self.width, 1
        while odd % 2 == 0:
            odd, power = odd // 2, 2 * power
        sizes = []
        while power > 1:
            sizes.append(min(power, LARGEST_FACTOR))
            power //= sizes[-1]
        factors = [_hadamard(size) for size in sizes]
        return (*factors, *([_hartley(odd)] if odd > 1 else []))

    @cached_property
    def _normal(self) -> Tensor | None:
        """The unit normal ``[width]`` of the reflecting plane; ``None`` without a reflection."""
        if not self.keeps_ones:
            return None
        ones = torch.ones(1, self.width, dtype=torch.float32, device=CPU)
        difference = self._spread(ones)[0].double() - 1
        length = float(difference.norm())
        return None if length < 1e-6 else (difference / length).float()


def settled_signs(width: int) -> Tensor:
    """Signs that look random, float32 ``[width]``, and are the same wherever they are computed.

    A place is mixed by shifts and products modulo 2**32; where the last bit is 1, the sign is -1.
    """
    mixed = torch.arange(1, width + 1, dtype=torch.int64, device=CPU)
    for shift, factor in MIXING:
        mixed = (mixed ^ (mixed >> shift)) * factor & 0xFFFFFFFF
    return 1.0 - 2.0 * (mixed ^ (mixed >> 16)).bitwise_and(1).float()


def _hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix of a power of two, normalized, float32."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device=CPU)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(size)).float()


def _hartley(size: int) -> Tensor:
    """The matrix of the Hartley transform, which is orthogonal for every size, float32."""
    index = torch.arange(size, dtype=torch.int64, device=CPU)
    angle = torch.outer(index, index).remainder(size).double() * (2 * math.pi / size)
    return ((angle.cos() + angle.sin()) / math.sqrt(size)).float()
