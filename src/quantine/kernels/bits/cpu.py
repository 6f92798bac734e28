"""`quantine.kernels.bits` by the native extension: tensors are on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.bits.reference import packed_bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """See `quantine.kernels.bits.pack`; that codes fit into ``bits`` is not checked here."""
    shape = (codes.shape[0], packed_bytes(codes.shape[1], bits))
    packed = torch.empty(shape, dtype=torch.uint8, device=codes.device)
    backend.extension().pack_bits(codes.contiguous(), packed, bits)
    return packed


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """See `quantine.kernels.bits.unpack`."""
    codes = torch.empty(packed.shape[0], columns, dtype=torch.uint8, device=packed.device)
    backend.extension().unpack_bits(packed.contiguous(), codes, bits)
    return codes
