"""Packing of integer codes into bytes, in plain PyTorch: the definition of the layout.

Each row is one little-endian bit stream: code ``j`` occupies bits ``j * bits`` to
``j * bits + bits - 1`` counted from the least significant bit of the row's first byte. A row ends
on a byte boundary; its unused last bits are zero. See docs/format.md.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(columns: int, bits: int) -> int:
    """Number of bytes of one packed row of ``columns`` codes of ``bits`` bits, rounded up."""
    return (columns * bits + 7) // 8


def pack_reference(codes: Tensor, bits: int) -> Tensor:
    """See `quantine.kernels.bits.pack`; that codes fit into ``bits`` is not checked here."""
    rows, columns = codes.shape
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes.unsqueeze(-1) >> shifts) & 1).reshape(rows, columns * bits)
    stream = torch.nn.functional.pad(stream, (0, -columns * bits % 8))
    weights = 2 ** torch.arange(8, dtype=torch.int32, device=codes.device)
    octets = stream.view(rows, packed_bytes(columns, bits), 8)
    return (octets.int() * weights).sum(-1).to(torch.uint8)


def unpack_reference(packed: Tensor, bits: int, columns: int) -> Tensor:
    """See `quantine.kernels.bits.unpack`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed.unsqueeze(-1) >> shifts) & 1).flatten(1)
    stream = stream[:, : columns * bits].reshape(packed.shape[0], columns, bits)
    weights = 2 ** torch.arange(bits, dtype=torch.int32, device=packed.device)
    return (stream.int() * weights).sum(-1).to(torch.uint8)
