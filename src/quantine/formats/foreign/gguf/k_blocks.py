"""Where the bits of ggml's K types lie: blocks of 256 weights with coded statistics.

Each function turns `quantine.formats.foreign.gguf.block_parts.Parts` of some blocks into their
bytes, or inverts that. https://github.com/ggml-org/ggml is the reference.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.formats.foreign.gguf.block_parts import Parts, as_bytes, as_halves

WEIGHTS: Final = 256
"""Number of weights of a block."""


def pack_q2(parts: Parts) -> Tensor:
    """Q2_K: a scale and a minimum of 4 bits for 16 weights, codes, ``d``, ``dmin``."""
    scales, minima = parts.coded()
    return torch.cat(
        [scales | minima << 4, _pairs(parts.codes), as_bytes(parts.scale), as_bytes(parts.least())],
        1,
    )


def unpack_q2(data: Tensor) -> Parts:
    """Invert `pack_q2`."""
    scale, minimum = as_halves(data[:, 80:82]), as_halves(data[:, 82:84])
    return Parts(_of_pairs(data[:, 16:80]), scale, minimum, data[:, :16] & 15, data[:, :16] >> 4)


def pack_q3(parts: Parts) -> Tensor:
    """Q3_K: third bits, two bits each, scales of 6 bits for 16 weights, ``d``."""
    (scales,) = parts.coded()
    third = (parts.codes >> 2).unflatten(1, (8, 32)) << _shifts(8, 1, parts.codes).view(1, 8, 1)
    low = scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4
    high = (scales >> 4).unflatten(1, (4, 4)) << _shifts(4, 2, scales).view(1, 4, 1)
    return torch.cat(
        [_sum(third), _pairs(parts.codes & 3), low, _sum(high), as_bytes(parts.scale)], 1
    )


def unpack_q3(data: Tensor) -> Parts:
    """Invert `pack_q3`."""
    third = data[:, None, :32] >> _shifts(8, 1, data).view(1, 8, 1) & 1
    low = torch.cat([data[:, 96:104] & 15, data[:, 96:104] >> 4], 1)
    high = data[:, None, 104:108] >> _shifts(4, 2, data).view(1, 4, 1) & 3
    codes = _of_pairs(data[:, 32:96]) | third.flatten(1) << 2
    return Parts(codes, as_halves(data[:, 108:110]), None, low | high.flatten(1) << 4)


def pack_q4(parts: Parts) -> Tensor:
    """Q4_K: ``d``, ``dmin``, scales and minima of 6 bits for 32 weights, codes."""
    return torch.cat([_head(parts), _nibbles(parts.codes, 32)], 1)


def unpack_q4(data: Tensor) -> Parts:
    """Invert `pack_q4`."""
    return _with_head(data, _of_nibbles(data[:, 16:], 32))


def pack_q5(parts: Parts) -> Tensor:
    """Q5_K: as Q4_K, with fifth bits before the rest of the codes."""
    fifth = (parts.codes >> 4).unflatten(1, (8, 32)) << _shifts(8, 1, parts.codes).view(1, 8, 1)
    return torch.cat([_head(parts), _sum(fifth), _nibbles(parts.codes & 15, 32)], 1)


def unpack_q5(data: Tensor) -> Parts:
    """Invert `pack_q5`."""
    fifth = data[:, None, 16:48] >> _shifts(8, 1, data).view(1, 8, 1) & 1
    return _with_head(data, _of_nibbles(data[:, 48:], 32) | fifth.flatten(1) << 4)


def pack_q6(parts: Parts) -> Tensor:
    """Q6_K: low nibbles, upper two bits, scales as signed bytes for 16 weights, ``d``."""
    (scales,) = parts.coded()
    return torch.cat(
        [
            _nibbles(parts.codes & 15, 64),
            _pairs(parts.codes >> 4),
            scales ^ 128,
            as_bytes(parts.scale),
        ],
        1,
    )


def unpack_q6(data: Tensor) -> Parts:
    """Invert `pack_q6`."""
    codes = _of_nibbles(data[:, :128], 64) | _of_pairs(data[:, 128:192]) << 4
    return Parts(codes, as_halves(data[:, 208:210]), None, data[:, 192:208] ^ 128)


def _head(parts: Parts) -> Tensor:
    """``d``, ``dmin``, and eight scales and minima of six bits in twelve bytes."""
    scales, minima = parts.coded()
    words = [
        scales[:, :4] | scales[:, 4:] >> 4 << 6,
        minima[:, :4] | minima[:, 4:] >> 4 << 6,
        scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4,
    ]
    return torch.cat([as_bytes(parts.scale), as_bytes(parts.least()), *words], 1)


def _with_head(data: Tensor, codes: Tensor) -> Parts:
    first, second, third = data[:, 4:8], data[:, 8:12], data[:, 12:16]
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], 1)
    minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], 1)
    return Parts(codes, as_halves(data[:, :2]), as_halves(data[:, 2:4]), scales, minima)


def _pairs(codes: Tensor) -> Tensor:
    """Two bits of each weight: of 128 weights the four runs of 32 share bytes."""
    runs: Tensor = codes.unflatten(1, (2, 4, 32)) << _shifts(4, 2, codes).view(1, 1, 4, 1)
    return runs.sum(2).to(torch.uint8).flatten(1)


def _of_pairs(data: Tensor) -> Tensor:
    runs: Tensor = data.unflatten(1, (2, 1, 32)) >> _shifts(4, 2, data).view(1, 1, 4, 1) & 3
    return runs.flatten(1)


def _nibbles(codes: Tensor, run: int) -> Tensor:
    """Four bits of each weight: two neighbouring runs of so many weights share bytes."""
    runs: Tensor = codes.unflatten(1, (-1, 2, run))
    return (runs[:, :, 0] | runs[:, :, 1] << 4).flatten(1)


def _of_nibbles(data: Tensor, run: int) -> Tensor:
    runs = data.unflatten(1, (-1, 1, run))
    return torch.cat([runs & 15, runs >> 4], 2).flatten(1)


def _shifts(count: int, step: int, like: Tensor) -> Tensor:
    return torch.arange(0, count * step, step, dtype=torch.uint8, device=like.device)


def _sum(bits: Tensor) -> Tensor:
    """Bits in different places of the same bytes, joined: over the second dimension."""
    return bits.sum(1).to(torch.uint8)
