"""Reading the float weights of a model, a few tensors at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from quantine.errors import CheckpointError, cut
from quantine.source.names import match_names
from quantine.source.pieces import Piece
from quantine.source.read_record import ReadRecord, tensor_digest
from quantine.source.tensor_files import Part, TensorFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOATS: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Dtypes of weights that can be quantized, by safetensors' names."""
COMPARED: Final = 2**22
"""Numbers of two tensors that are compared at once, and so are in memory."""


class Checkpoint:
    """Stored tensors of a model, addressed by the model's parameter names.

    Args:
        files: hold the tensors.
        model: the model that they belong to, for its names; ``None`` takes names as they are.
        record: gets the digest of each tensor that `read` returns; ``None`` digests nothing.

    Attributes:
        record: what has been read, if that is recorded.
        unused: names of stored tensors for which the model has no use.

    Raises:
        CheckpointError: a tensor is there twice, or in another layout than the model's.
    """

    def __init__(
        self,
        files: TensorFiles,
        model: PreTrainedModel | None = None,
        record: ReadRecord | None = None,
    ) -> None:
        self._files, self.record = files, record
        self._stored = {name: name for name in files.headers}
        self._pieces: dict[str, Piece] = {}
        self._joined: dict[str, tuple[str, ...]] = {}
        self.unused: tuple[str, ...] = ()
        if model is not None:
            names = match_names(model, files.headers)
            self._stored, self._pieces, self.unused = names.stored, names.pieces, names.unused
            self._joined = names.joined

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors ``names``, in their stored dtypes, as copies that own their memory.

        Raises:
            CheckpointError: a tensor is missing or its file unreadable; or, where it is recorded,
                it is not finite, or not what was read before.
        """
        tensors = self._read(names)
        if self.record is not None:
            for name, tensor in tensors.items():
                self.record.add(name, tensor, self._file(name))
        return tensors

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """What `read` returns, unrecorded."""
        wanted = [(name, stored) for name in names for stored in self._stored_names(name)]
        asked: list[tuple[str, Part]] = []
        for name, stored in wanted:
            piece = self._pieces.get(name)
            asked.append((stored, None if piece is None else piece.expert))
        found: dict[str, dict[str, Tensor]] = {}
        for (name, stored), tensor in zip(wanted, self._files.read(asked), strict=True):
            piece = self._pieces.get(name)
            if piece is not None:
                tensor = piece.of(tensor).clone(memory_format=torch.contiguous_format)
            found.setdefault(name, {})[stored] = tensor
        return {name: self._whole(name, parts) for name, parts in found.items()}

    def _whole(self, name: str, parts: dict[str, Tensor]) -> Tensor:
        """The tensor ``name``, of its parts by their names in the files, which may be just one.

        Raises:
            CheckpointError: parts differ in their dtypes, or in all dimensions but the first.
        """
        ordered = [parts[stored] for stored in self._stored_names(name)]
        if len(ordered) == 1:
            return ordered[0]
        if len({(part.dtype, part.shape[1:]) for part in ordered}) > 1:
            raise CheckpointError(
                f"{name} is stored in parts that do not fit together: {cut(', '.join(parts), 120)}"
            )
        return torch.cat(ordered)

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Shapes by name, of those of ``names`` that exist."""
        shapes = {}
        for name in names:
            if name in self._stored:
                shape, *others = (
                    self._files.headers[stored].shape for stored in self._stored_names(name)
                )
                piece = self._pieces.get(name)
                shapes[name] = shape if piece is None else _shape_of(piece, shape)
                if others:
                    shapes[name] = (sum(part[0] for part in (shape, *others)), *shape[1:])
        return shapes

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which the tensor ``name`` is stored.

        Raises:
            CheckpointError: there is no such tensor, or it is not floating-point.
        """
        code = self._files.headers[self._stored_name(name)].dtype
        if code not in FLOATS:
            raise CheckpointError(
                f"{name} is stored as {code}: only checkpoints in floating-point numbers of 16, 32 "
                "or 64 bits can be quantized"
            )
        return FLOATS[code]

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two matrices hold the same float32 numbers; some rows are read at a time.

        Raises:
            CheckpointError: one is missing, or its file unreadable.
        """
        stored = self._stored_name(name), self._stored_name(other)
        if stored[0] == stored[1]:
            return True
        shapes = self.shapes([name, other])
        if shapes[name] != shapes[other]:
            return False
        rows, *columns = shapes[name] or (1,)
        step = max(1, COMPARED // max(1, math.prod(columns)))
        parts = (slice(start, start + step) for start in range(0, rows, step))
        pairs = (self._files.read([(name, part) for name in stored]) for part in parts)
        return all(torch.equal(one.float(), two.float()) for one, two in pairs)

    def digest(self) -> str:
        """Hash of every tensor's name, dtype, shape and bytes; what is recorded is not read again.

        Raises:
            CheckpointError: a tensor is not finite.
        """
        record = self.record or ReadRecord()
        total = hashlib.blake2b(digest_size=16)
        for name in sorted(self._stored):
            if name not in record:
                record.add(name, self._read([name])[name], self._file(name))
            total.update(f"{name} {record[name]}\n".encode())
        return total.hexdigest()

    def changed(self) -> str | None:
        """A tensor that is recorded, but is now another; ``None`` if all are what they were.

        Files with the size and the time of change that were recorded are not read.

        Raises:
            CheckpointError: a file is unreadable.
        """
        record = self.record
        if record is None:
            return None
        files = {header.file for header in self._files.headers.values()}
        touched = {file for file in files if not record.is_unchanged(file)}
        for name in record.names():
            if name not in self:
                return name
            parts = {self._files.headers[stored].file for stored in self._stored_names(name)}
            if parts & touched and tensor_digest(self._read([name])[name]) != record[name]:
                return name
        for file in touched:
            record.look(file)
        return None

    def _file(self, name: str) -> Path:
        """The file that holds the tensor ``name``."""
        return self._files.headers[self._stored_name(name)].file

    def _stored_names(self, name: str) -> tuple[str, ...]:
        """The names in the files of all parts of the tensor ``name``, in their order."""
        return self._joined.get(name) or (self._stored_name(name),)

    def _stored_name(self, name: str) -> str:
        """The name in the files of the tensor ``name``."""
        if name not in self._stored:
            raise CheckpointError(
                f"{self._files.directory} holds no tensor {name}: the download may be incomplete, "
                "or the weights belong to another architecture"
            )
        return self._stored[name]


def _shape_of(piece: Piece, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a part of a tensor of ``shape``; that of a tensor without it is left as it is."""
    if not 1 < len(shape) < 4 or piece.expert >= shape[0]:
        return shape
    return tuple(piece.of(torch.empty(shape[1:], dtype=torch.float32, device="meta")).shape)
