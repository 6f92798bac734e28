"""Streams of codes in words of 32 bits, as GPTQ and compressed-tensors files hold them."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.kernels.bits import pack, unpack

WORD: Final = 32
"""Bits of a word."""


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Each row of ``codes`` ``[rows, n]`` uint8 as one unbroken stream, int32 ``[rows, words]``."""
    packed = pack(codes.contiguous(), bits)
    missing = -packed.shape[1] % 4
    if missing:
        packed = torch.cat([packed, packed.new_zeros(len(packed), missing)], 1)
    words: Tensor = packed.contiguous().view(torch.int32)
    return words


def unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """Invert `pack_rows`: ``count`` codes of each row, uint8."""
    packed = words.contiguous().view(torch.uint8)[:, : -(-count * bits // 8)]
    codes: Tensor = unpack(packed.contiguous(), bits, count)
    return codes


def words_of(count: int, bits: int) -> int:
    """Number of words of a stream of ``count`` codes."""
    return -(-count * bits // WORD)
