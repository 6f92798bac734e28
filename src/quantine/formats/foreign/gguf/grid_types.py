"""ggml's types as grids: the spec of each, and how its blocks are packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantine.core.grid import Statistic
from quantine.core.qtensor import QTensor
from quantine.core.spec import FLOAT16, QuantSpec
from quantine.errors import FormatError
from quantine.formats.foreign.gguf import k_blocks
from quantine.formats.foreign.gguf.block_parts import (
    Parts,
    as_bytes,
    as_halves,
    parts_of,
    qtensor_of,
)
from quantine.formats.foreign.gguf.blocks import TYPES, BlockType


@dataclass(frozen=True)
class GridType:
    """One of ggml's types whose blocks are a grid of quantine's.

    Attributes:
        name: as ggml has it.
        code: in files.
        file_type: what ``general.file_type`` calls a file that is mostly of this type.
        weights, nbytes: of a block.
        spec: the grid, with all that a block has room for.
        pack: turns the numbers of blocks into ``[blocks, nbytes]`` uint8.
        unpack: inverts ``pack``.
    """

    name: str
    code: int
    file_type: int
    weights: int
    nbytes: int
    spec: QuantSpec
    pack: Callable[[Parts], Tensor]
    unpack: Callable[[Tensor], Parts]

    def holds(self, qtensor: QTensor) -> bool:
        """Whether codes and statistics of a matrix are such as the type has, in whole blocks."""
        grid, spec = qtensor.grid, self.spec
        alike = (grid.bits, grid.group_size, grid.axis) == (spec.bits, spec.group_size, "in")
        if not alike or grid.zero_point is not None or qtensor.codes.shape[1] % self.weights:
            return False
        if (grid.minimum is None) != spec.sym or not _coded_as(grid.scale, spec.scale_bits, spec):
            return False
        return grid.minimum is None or _coded_as(grid.minimum, spec.zero_bits, spec)

    def encode(self, qtensor: QTensor) -> Tensor:
        """The rows of a matrix on the grid ``spec`` as bytes, ``[rows, bytes]`` uint8."""
        return self.pack(parts_of(qtensor, self.weights)).reshape(len(qtensor.codes), -1)

    def decode(self, data: Tensor) -> QTensor:
        """Invert `encode`."""
        return qtensor_of(self.unpack(data.reshape(-1, self.nbytes)), len(data), self.spec)

    def check_statistics(self, data: Tensor) -> None:
        """Refuse rows of bytes, as `encode` makes them, with a float16 that is not finite."""
        parts = self.unpack(data.reshape(-1, self.nbytes))
        for halves in (parts.scale, parts.minimum):
            if halves is not None and not bool(torch.isfinite(halves).all()):
                raise FormatError(f"blocks of {self.name} hold a scale that is not finite")


def _coded_as(stored: Tensor | Statistic, bits: int, spec: QuantSpec) -> bool:
    """Whether scales or minima are float16, or codes along a line, as ``spec`` has them."""
    if isinstance(stored, Tensor):
        return bits == FLOAT16 and stored.dtype == torch.float16
    second = stored.grid
    return (second.bits, second.group_size, second.axis) == (bits, spec.stat_group_size, "out")


def _simple(kind: BlockType, bits: int) -> GridType:
    """A type of one signed scale, as `quantine.formats.foreign.gguf.blocks` packs it."""

    def pack(parts: Parts) -> Tensor:
        return torch.cat([as_bytes(parts.scale), kind.pack(parts.codes)], 1)

    def unpack(data: Tensor) -> Parts:
        return Parts(kind.unpack(data[:, 2:].contiguous()), as_halves(data[:, :2]))

    spec = QuantSpec(bits, kind.weights, True, signed=True)
    nbytes = kind.nbytes
    return GridType(kind.name, kind.code, kind.file_type, kind.weights, nbytes, spec, pack, unpack)


def _with_minimum(name: str, code: int, file_type: int, like: BlockType, bits: int) -> GridType:
    """A type of one scale and a float16 that is added, codes packed as in ``like``."""

    def pack(parts: Parts) -> Tensor:
        halves = [as_bytes(parts.scale), as_bytes(_negated(parts.least()))]
        return torch.cat([*halves, like.pack(parts.codes)], 1)

    def unpack(data: Tensor) -> Parts:
        codes = like.unpack(data[:, 4:].contiguous())
        return Parts(codes, as_halves(data[:, :2]), _negated(as_halves(data[:, 2:4])))

    spec = QuantSpec(bits, like.weights, zero_bits=FLOAT16, minimum=True)
    return GridType(name, code, file_type, like.weights, like.nbytes + 2, spec, pack, unpack)


def _negated(halves: Tensor) -> Tensor:
    """Float16 numbers with the other sign, bit by bit, whatever they are."""
    return (halves.contiguous().view(torch.int16) ^ -(2**15)).view(torch.float16)


def _coded(bits: int, group_size: int, stat_bits: int, sym: bool) -> QuantSpec:
    """The spec of a K type, which has coded statistics of 256 weights."""
    return QuantSpec(
        bits,
        group_size,
        sym,
        stat_bits,
        0 if sym else stat_bits,
        k_blocks.WEIGHTS // group_size,
        signed=sym,
        minimum=not sym,
        stat_axis="groups",
    )


_BY_NAME: Final = {kind.name: kind for kind in TYPES}
GRID_TYPES: Final = {
    kind.name: kind
    for kind in (
        _simple(_BY_NAME["Q4_0"], 4),
        _with_minimum("Q4_1", 3, 3, _BY_NAME["Q4_0"], 4),
        _simple(_BY_NAME["Q5_0"], 5),
        _with_minimum("Q5_1", 7, 9, _BY_NAME["Q5_0"], 5),
        _simple(_BY_NAME["Q8_0"], 8),
        GridType(
            "Q2_K", 10, 10, 256, 84, _coded(2, 16, 4, False), k_blocks.pack_q2, k_blocks.unpack_q2
        ),
        GridType(
            "Q3_K", 11, 12, 256, 110, _coded(3, 16, 6, True), k_blocks.pack_q3, k_blocks.unpack_q3
        ),
        GridType(
            "Q4_K", 12, 15, 256, 144, _coded(4, 32, 6, False), k_blocks.pack_q4, k_blocks.unpack_q4
        ),
        GridType(
            "Q5_K", 13, 17, 256, 176, _coded(5, 32, 6, False), k_blocks.pack_q5, k_blocks.unpack_q5
        ),
        GridType(
            "Q6_K", 14, 18, 256, 210, _coded(6, 16, 8, True), k_blocks.pack_q6, k_blocks.unpack_q6
        ),
    )
}
"""Types by name."""


def type_of(spec: QuantSpec) -> GridType | None:
    """The type whose grid is that of ``spec``; ``None`` if there is none."""
    return next((kind for kind in GRID_TYPES.values() if kind.spec == spec), None)
