"""Packing of codes: the native kernel where it exists, else `quantine.core.bits`."""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.core.bits import pack_reference, packed_bytes, unpack_reference
from quantine.errors import FormatError
from quantine.kernels import backend


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack ``codes`` ``[rows, columns]`` uint8 into ``[rows, packed_bytes]`` uint8.

    Raises:
        FormatError: a code does not fit into ``bits``.
    """
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise FormatError(f"code {int(codes.max())} does not fit into {bits} bits")
    native = backend.native()
    if native is None:
        return pack_reference(codes, bits)
    packed = torch.empty(codes.shape[0], packed_bytes(codes.shape[1], bits), dtype=torch.uint8)
    native.pack_bits(codes.contiguous(), packed, bits)
    return packed


@torch.library.custom_op("quantine::unpack", mutates_args=())
def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Invert `pack`: ``[rows, columns]`` uint8 codes."""
    native = backend.native() if packed.device.type == "cpu" else None
    if native is None:
        return unpack_reference(packed, bits, columns)
    codes = torch.empty(packed.shape[0], columns, dtype=torch.uint8)
    native.unpack_bits(packed.contiguous(), codes, bits)
    return codes


@unpack.register_fake
def _(packed: Tensor, bits: int, columns: int) -> Tensor:
    return packed.new_empty(packed.shape[0], columns)
