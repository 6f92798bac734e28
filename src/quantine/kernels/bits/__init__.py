"""Packing of integer codes of at most 8 bits into bytes without gaps.

`quantine.kernels.bits.reference` describes the layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.errors import FormatError
from quantine.kernels import backend
from quantine.kernels.bits import cpu
from quantine.kernels.bits.reference import pack_reference, unpack_reference


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes.

    Args:
        codes: ``[rows, columns]`` uint8, each below ``2**bits``.
        bits: number of bits of one code.

    Returns:
        ``[rows, bytes]`` uint8, see `quantine.kernels.bits.reference.packed_bytes`.

    Raises:
        FormatError: a code does not fit into ``bits``.
    """
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise FormatError(f"code {int(codes.max())} does not fit into {bits} bits")
    if backend.of(codes) == "native":
        return cpu.pack(codes, bits)
    return pack_reference(codes, bits)


@torch.library.custom_op("quantine::unpack", mutates_args=())
def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Read the codes that `pack` wrote.

    Args:
        packed: ``[rows, bytes]`` uint8.
        bits: number of bits of one code.
        columns: number of codes in a row.

    Returns:
        ``[rows, columns]`` uint8.
    """
    if backend.of(packed) == "native":
        return cpu.unpack(packed, bits, columns)
    return unpack_reference(packed, bits, columns)


@unpack.register_fake
def _(packed: Tensor, bits: int, columns: int) -> Tensor:
    return packed.new_empty(packed.shape[0], columns)
