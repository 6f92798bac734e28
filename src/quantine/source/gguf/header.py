"""GGUF files: what their headers say, checked to the last byte before a library reads them.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md is the specification.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from quantine.errors import CheckpointError, cut, shown

MAGIC: Final = b"GGUF"
"""The first four bytes of every file."""
VERSIONS: Final = (2, 3)
"""Versions of the format that are read."""
NUMBERS: Final = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
"""Layouts of numbers in metadata, by the code of their type."""
LENGTH: Final = struct.Struct("<Q")
"""Layout of the length of a text, which stands before it."""
STRING: Final = 8
"""Code of the type of text in metadata."""
ARRAY: Final = 9
"""Code of the type of arrays in metadata."""
ALIGNMENT: Final = 32
"""Bytes of which each tensor's offset is a multiple, where metadata do not say otherwise."""
UNLISTED: Final = {42: (64, 18)}
"""Weights and bytes of a block of types that quantine decodes and the ``gguf`` package may not
know, by code: Q2_0, see `quantine.formats.foreign.gguf.blocks`."""
MOST_DIMENSIONS: Final = 4
"""Largest number of dimensions of a tensor."""


class Length(NamedTuple):
    """Stands for an array in metadata, whose items nothing here needs."""

    items: int


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor of a GGUF file lies.

    Attributes:
        name: as llama.cpp calls it.
        shape: in PyTorch's order.
        type: code of ggml's type.
        file: that holds it.
        offset: of its first byte, counted from the start of the file.
        nbytes: number of its bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    file: Path
    offset: int
    nbytes: int

    def read(self) -> bytes:
        """Its bytes, as they are stored.

        Raises:
            CheckpointError: the file cannot be read, or ends early.
        """
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.nbytes)
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read: {cut(error)}") from error
        if len(data) != self.nbytes:
            raise CheckpointError(f"{self.file} ends within {self.name[:60]}: it was cut off")
        return data


@dataclass(frozen=True)
class GGUFFile:
    """The header of one GGUF file.

    Attributes:
        path: of the file.
        metadata: values by key; an array is only its `Length`.
        tensors: in the order of the header.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]


def read_header(path: Path) -> GGUFFile:
    """Read the header of a GGUF file, and check that the file holds all it speaks of.

    Args:
        path: of the file.

    Raises:
        CheckpointError: the file is cut off or damaged, or holds a tensor of an unknown type.
    """
    try:
        with path.open("rb") as file:
            return _Header(path, file).read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged or half downloaded: its header ends early or is not GGUF"
        ) from error


class _Header:
    """Reads the header of one file from its start to its end.

    Its methods raise ``struct.error`` where the file ends early.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = path.stat().st_size

    def read(self) -> GGUFFile:
        if self._bytes(4) != MAGIC or self._number("<I") not in VERSIONS:
            raise CheckpointError(f"{self._path} is not a GGUF file of version 2 or 3")
        count, entries = self._number("<Q"), self._number("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._text()
            if key in metadata:
                raise CheckpointError(f"{self._path} is damaged: it has {key[:60]} twice")
            metadata[key] = self._value(self._number("<I"))
        infos = [self._tensor() for _ in range(count)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self._path} is damaged: general.alignment is {shown(alignment)}, which is no "
                "power of two"
            )
        data = self._file.tell()
        data += -data % alignment
        tensors = tuple(self._placed(*info, data) for info in infos)
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise CheckpointError(f"{self._path} is damaged: it names a tensor twice")
        self._check_places(tensors, alignment)
        return GGUFFile(self._path, metadata, tensors)

    def _check_places(self, tensors: Sequence[GGUFTensor], alignment: int) -> None:
        """Refuse tensors that begin elsewhere than at whole units, or share bytes."""
        ordered = sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes))
        for tensor in ordered:
            if tensor.offset % alignment:
                raise CheckpointError(
                    f"{self._path} is damaged: {tensor.name[:60]} begins at {tensor.offset}, which "
                    f"is no multiple of {alignment}"
                )
        for one, other in itertools.pairwise(ordered):
            if one.offset + one.nbytes > other.offset:
                raise CheckpointError(
                    f"{self._path} is damaged: {one.name[:60]} and {other.name[:60]} share bytes"
                )

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._file.tell():  # before memory is taken for it
            raise struct.error("the file ends early")
        return self._file.read(count)

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._bytes(struct.calcsize(layout)))[0]

    def _text(self) -> str:
        return self._bytes(self._number("<Q")).decode()

    def _value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self._number(NUMBERS[kind])
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            raise CheckpointError(f"{self._path} is damaged: metadata of an unknown type {kind}")
        item, length = self._number("<I"), self._number("<Q")
        if item in NUMBERS:
            self._bytes(length * struct.calcsize(NUMBERS[item]))
        elif item == STRING:
            self._pass_texts(length)
        else:
            raise CheckpointError(f"{self._path} is damaged: metadata of an unknown type {item}")
        return Length(length)

    def _pass_texts(self, count: int) -> None:
        """Go past so many texts, of which a vocabulary has hundreds of thousands."""
        place = self._file.tell()
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for _ in range(count):
                place += LENGTH.size + LENGTH.unpack_from(data, place)[0]
                if place > self._size:
                    raise struct.error("the file ends early")
        self._file.seek(place)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._text(), self._number("<I")
        if dimensions > MOST_DIMENSIONS:
            raise CheckpointError(f"{self._path} is damaged: {name[:60]} has {dimensions} axes")
        shape = tuple(reversed([self._number("<Q") for _ in range(dimensions)]))
        return name, shape, self._number("<I"), self._number("<Q")

    def _placed(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, data: int
    ) -> GGUFTensor:
        sizes = UNLISTED.get(kind) or _sizes(self._path, name, kind)
        nbytes = _nbytes(self._path, name, shape, sizes)
        if data + offset + nbytes > self._size:
            raise CheckpointError(
                f"{self._path} is damaged or half downloaded: it has {self._size} bytes, but "
                f"{name[:60]} ends at {data + offset + nbytes}"
            )
        return GGUFTensor(name, shape, kind, self._path, data + offset, nbytes)


def _sizes(path: Path, name: str, kind: int) -> tuple[int, int]:
    """Weights and bytes of a block, once it is sure that the ``gguf`` package can decode it."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        known = GGMLQuantizationType(kind)
        values, nbytes = GGML_QUANT_SIZES[known]
        dequantize(np.zeros((1, nbytes), np.uint8), known)
    except (ValueError, NotImplementedError, KeyError) as error:
        raise CheckpointError(
            f"{name[:60]} in {path} is of ggml's type {kind}, which cannot be decoded: quantize "
            "the model that the GGUF file was made from"
        ) from error
    return values, nbytes


def _nbytes(path: Path, name: str, shape: tuple[int, ...], sizes: tuple[int, int]) -> int:
    """Bytes of a tensor of blocks of these sizes."""
    values, nbytes = sizes
    if not shape or shape[-1] % values:
        raise CheckpointError(
            f"{path} is damaged: the rows of {name[:60]} {shape} are not whole blocks of {values}"
        )
    return math.prod(shape) // values * nbytes
