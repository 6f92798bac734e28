"""Reading the float weights of a Hugging Face directory, a few tensors at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantine.errors import CheckpointError, cut, is_out_of_memory
from quantine.source.names import match_names
from quantine.source.pieces import Piece
from quantine.source.read_record import ReadRecord, tensor_digest
from quantine.source.weight_files import weight_files

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
    """Tensors of a directory of safetensors files, addressed by the model's parameter names.

    Files are opened for each read and closed after it, so nothing stays mapped.

    Args:
        directory: holds the files, see `quantine.source.weight_files.weight_files`.
        model: the model that they belong to, for its names; ``None`` takes names as they are.
        record: gets the digest of each tensor that `read` returns; ``None`` digests nothing.

    Attributes:
        directory: that holds the files.
        record: what has been read, if that is recorded.
        unused: names of stored tensors for which the model has no use.

    Raises:
        CheckpointError: no safetensors weights, a file is missing, a header is unreadable, or a
            tensor is there twice.
    """

    def __init__(
        self,
        directory: Path,
        model: PreTrainedModel | None = None,
        record: ReadRecord | None = None,
    ) -> None:
        self.directory, self.record = directory, record
        self._file_of: dict[str, Path] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}  # shape and dtype
        for file in weight_files(directory):
            with _opened(file) as shard:
                within = shard.keys()  # a handle is not iterable itself
                for name in within:
                    part = shard.get_slice(name)
                    self._file_of[name] = file
                    self._headers[name] = tuple(part.get_shape()), str(part.get_dtype())
        self._stored = {name: name for name in self._file_of}
        self._pieces: dict[str, Piece] = {}
        self.unused: tuple[str, ...] = ()
        if model is not None:
            names = match_names(model, self._file_of)
            self._stored, self._pieces, self.unused = names.stored, names.pieces, names.unused

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
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name in names:
            stored = self._stored_name(name)
            by_file.setdefault(self._file_of[stored], []).append((name, stored))
        tensors = {}
        for file, pairs in by_file.items():
            with _opened(file) as shard:
                for name, stored in pairs:
                    piece = self._pieces.get(name)
                    if piece is None:
                        tensors[name] = shard.get_tensor(stored).clone()
                    else:
                        tensors[name] = piece.of(shard.get_slice(stored)[piece.expert]).clone(
                            memory_format=torch.contiguous_format
                        )
        return tensors

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Shapes by name, of those of ``names`` that exist."""
        shapes = {}
        for name in names:
            if name in self._stored:
                shape, _ = self._headers[self._stored[name]]
                piece = self._pieces.get(name)
                shapes[name] = shape if piece is None else _shape_of(piece, shape)
        return shapes

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which the tensor ``name`` is stored.

        Raises:
            CheckpointError: there is no such tensor, or it is not floating-point.
        """
        _, code = self._headers[self._stored_name(name)]
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
        with _opened(self._file_of[stored[0]]) as one, _opened(self._file_of[stored[1]]) as two:
            pair = one.get_slice(stored[0]), two.get_slice(stored[1])
            return all(
                torch.equal(*(part[start : start + step].float() for part in pair))
                for start in range(0, rows, step)
            )

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
        files = set(self._file_of.values())
        touched = {file for file in files if not record.is_unchanged(file)}
        for name in record.names():
            if name not in self:
                return name
            file = self._file(name)
            if file in touched and tensor_digest(self._read([name])[name]) != record[name]:
                return name
        for file in touched:
            record.look(file)
        return None

    def _file(self, name: str) -> Path:
        """The file that holds the tensor ``name``."""
        return self._file_of[self._stored_name(name)]

    def _stored_name(self, name: str) -> str:
        """The name in the files of the tensor ``name``."""
        if name not in self._stored:
            raise CheckpointError(
                f"{self.directory} holds no tensor {name}: the download may be incomplete, "
                "or the weights belong to another architecture"
            )
        return self._stored[name]


def _shape_of(piece: Piece, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a part of a tensor of ``shape``; that of a tensor without it is left as it is."""
    if not 1 < len(shape) < 4 or piece.expert >= shape[0]:
        return shape
    return tuple(piece.of(torch.empty(shape[1:], dtype=torch.float32, device="meta")).shape)


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({cut(error)}): it is damaged or half downloaded"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{file} of {file.stat().st_size / 1e9:.1f} GB does not fit into the memory that this "
            "process may take: save the model in smaller files (max_shard_size)"
        ) from error
