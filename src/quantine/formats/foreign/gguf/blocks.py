"""The blocks of GGUF files that are grids of quantine's: one scale, whole numbers around zero.

A block holds consecutive inputs of one output; its weights are ``d * v`` with a float16 ``d`` of
either sign and whole ``v``. https://github.com/ggml-org/ggml is the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantine.formats.foreign.plain import Plain


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types.

    Attributes:
        name: as ggml has it.
        code: in files.
        weights: of a block.
        low, high: least and largest ``v``.
        file_type: what ``general.file_type`` calls a file that is mostly of this type.
        pack: turns ``v - low`` ``[blocks, weights]`` uint8 into the bytes behind the scale.
        unpack: inverts ``pack``.
    """

    name: str
    code: int
    weights: int
    low: int
    high: int
    file_type: int
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        empty = torch.zeros(1, self.weights, dtype=torch.uint8, device="cpu")
        return 2 + self.pack(empty).shape[1]

    def encode(self, values: Tensor, scale: Tensor) -> Tensor:
        """The rows of a matrix as bytes.

        Args:
            values: ``v`` ``[rows, columns]`` int16.
            scale: ``d`` ``[rows, blocks]`` float16.

        Returns:
            ``[rows, bytes]`` uint8.
        """
        blocks = (values - self.low).to(torch.uint8).reshape(-1, self.weights)
        scales = scale.reshape(-1, 1).contiguous().view(torch.uint8)
        return torch.cat([scales, self.pack(blocks)], 1).reshape(len(values), -1)

    def decode(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Invert `encode`: ``(values, scale)``."""
        blocks = data.reshape(-1, self.nbytes)
        scale = blocks[:, :2].contiguous().view(torch.float16).reshape(len(data), -1)
        values = self.unpack(blocks[:, 2:].contiguous()).to(torch.int16) + self.low
        return values.reshape(len(data), -1), scale


def _pack_nibbles(codes: Tensor) -> Tensor:
    half = codes.shape[1] // 2
    return codes[:, :half] & 15 | (codes[:, half:] & 15) << 4


def _unpack_nibbles(data: Tensor) -> Tensor:
    return torch.cat([data & 15, data >> 4], 1)


def _pack_fives(codes: Tensor) -> Tensor:
    """A fifth bit of each weight in one word, then nibbles."""
    shifts = torch.arange(8, device=codes.device, dtype=torch.uint8)
    fifth = (codes >> 4).reshape(-1, 4, 8) << shifts
    return torch.cat([fifth.sum(2).to(torch.uint8), _pack_nibbles(codes)], 1)


def _unpack_fives(data: Tensor) -> Tensor:
    shifts = torch.arange(8, device=data.device, dtype=torch.uint8)
    fifth = data[:, :4].unsqueeze(2) >> shifts & 1
    return _unpack_nibbles(data[:, 4:]) | fifth.flatten(1) << 4


def _pack_pairs(codes: Tensor) -> Tensor:
    """Four weights a byte, lowest first."""
    fours = codes.reshape(len(codes), -1, 4)
    return fours[..., 0] | fours[..., 1] << 2 | fours[..., 2] << 4 | fours[..., 3] << 6


def _unpack_pairs(data: Tensor) -> Tensor:
    shifts = torch.arange(0, 8, 2, device=data.device, dtype=torch.uint8)
    return (data.unsqueeze(2) >> shifts & 3).flatten(1)


def _flip(codes: Tensor) -> Tensor:
    """Between two's complement and numbers from 0, of 8 bits."""
    return codes ^ 128


TYPES: Final = (
    BlockType("Q2_0", 42, 64, -1, 2, 42, _pack_pairs, _unpack_pairs),
    BlockType("Q4_0", 2, 32, -8, 7, 2, _pack_nibbles, _unpack_nibbles),
    BlockType("Q5_0", 6, 32, -16, 15, 8, _pack_fives, _unpack_fives),
    BlockType("Q8_0", 8, 32, -128, 127, 7, _flip, _flip),
)
"""From the smallest to the largest."""
LEAST: Final = 32
"""Number of weights of a block that all grids must have, but those of Q2_0."""


def fitting(matrix: Plain) -> tuple[BlockType, Tensor, Tensor] | None:
    """The smallest type that holds a matrix without loss, with its ``v`` and ``d``.

    Returns:
        ``(type, values, scale)`` for `BlockType.encode`; ``None`` if no type holds it.
    """
    values = matrix.codes.to(torch.int16) - matrix.by_weight()[1]
    for kind in TYPES:
        if matrix.group_size % kind.weights:
            continue
        blocks = values.unflatten(1, (-1, kind.weights))
        least, most = blocks.aminmax(dim=2)
        plus = (least >= kind.low) & (most <= kind.high)
        minus = (-most >= kind.low) & (-least <= kind.high)
        if bool((plus | minus).all()):
            sign = torch.where(plus, 1, -1).to(torch.int16)
            scale = matrix.scale.repeat_interleave(matrix.group_size // kind.weights, 1)
            return kind, (blocks * sign.unsqueeze(2)).flatten(1), scale * sign.half()
    return None
