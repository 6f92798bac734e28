"""Packing of integer codes into bytes, in plain PyTorch: the definition of the layout.

Each row is one little-endian bit stream: code ``j`` occupies bits ``j * bits`` to
``j * bits + bits - 1`` counted from the least significant bit of the row's first byte. A row ends
on a byte boundary; its unused last bits are zero. See docs/format.md.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

CHUNK: Final = 2**20
"""Number of codes that are packed at once, which bounds temporary memory to 24 bytes for each."""


def packed_bytes(columns: int, bits: int) -> int:
    """Number of bytes of one packed row of ``columns`` codes of ``bits`` bits, rounded up."""
    return (columns * bits + 7) // 8


def pack_reference(codes: Tensor, bits: int) -> Tensor:
    """See `quantine.kernels.bits.pack`; that codes fit into ``bits`` is not checked here."""
    return torch.cat([_pack_rows(rows, bits) for rows in codes.split(_rows(codes.shape[1]))])


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    stream = ((codes.unsqueeze(-1) >> places[:bits]) & 1).reshape(rows, columns * bits)
    stream = torch.nn.functional.pad(stream, (0, -columns * bits % 8))
    octets = stream.view(rows, packed_bytes(columns, bits), 8)
    return (octets << places).sum(-1, dtype=torch.uint8)


def unpack_reference(packed: Tensor, bits: int, columns: int) -> Tensor:
    """See `quantine.kernels.bits.unpack`."""
    parts = packed.split(_rows(columns))
    return torch.cat([_unpack_rows(rows, bits, columns) for rows in parts])


def _unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed.unsqueeze(-1) >> places) & 1).flatten(1)
    stream = stream[:, : columns * bits].reshape(packed.shape[0], columns, bits)
    return (stream << places[:bits]).sum(-1, dtype=torch.uint8)


def _rows(columns: int) -> int:
    """Number of rows of ``columns`` codes that are packed at once."""
    return max(1, CHUNK // max(1, columns))
