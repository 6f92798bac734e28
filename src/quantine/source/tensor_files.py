"""Where the tensors of a model are stored, and how a few of them are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantine.errors import CheckpointError, cut, is_out_of_memory
from quantine.source.weight_files import weight_files

Part = int | slice | None
"""What is read of a tensor in its first dimension; ``None`` stands for the whole."""


@dataclass(frozen=True)
class Header:
    """What is known of a tensor that is not read yet.

    Attributes:
        shape: as it is read.
        dtype: as it is read, by safetensors' name, such as ``"F16"``.
        file: that holds it.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path


class TensorFiles(Protocol):
    """The stored tensors of a model, of whatever kind its files are."""

    @property
    def directory(self) -> Path:
        """The directory of the files."""
        ...

    @property
    def headers(self) -> Mapping[str, Header]:
        """Every tensor, by the name under which it is read."""
        ...

    def read(self, wanted: Sequence[tuple[str, Part]]) -> list[Tensor]:
        """Tensors, or parts of them; parts may share memory with what they are part of.

        Raises:
            QuantineError: a tensor cannot be read, or is damaged.
        """
        ...


class SafetensorsFiles:
    """The safetensors files of a directory, see `TensorFiles`.

    Files are opened for each read and closed after it, so nothing stays mapped.

    Args:
        directory: holds the files, see `quantine.source.weight_files.weight_files`.

    Raises:
        CheckpointError: there are none, one is missing, a header is unreadable, or two files hold
            one tensor.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.headers: dict[str, Header] = {}
        for file in weight_files(directory):
            with _opened(file) as shard:
                within = shard.keys()  # a handle is not iterable itself
                for name in within:
                    if name in self.headers:
                        raise CheckpointError(
                            f"{name} is in {self.headers[name].file.name} and in {file.name} of "
                            f"{directory}: which one counts is open; download the model again"
                        )
                    part = shard.get_slice(name)
                    shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
                    self.headers[name] = Header(shape, dtype, file)

    def read(self, wanted: Sequence[tuple[str, Part]]) -> list[Tensor]:
        """See `TensorFiles`; whole tensors are copies that own their memory.

        Raises:
            CheckpointError: a file is unreadable.
        """
        places: dict[Path, list[int]] = {}
        for place, (name, _) in enumerate(wanted):
            places.setdefault(self.headers[name].file, []).append(place)
        found: dict[int, Tensor] = {}
        for file, within in places.items():
            with _opened(file) as shard:
                for place in within:
                    name, part = wanted[place]
                    if part is None:
                        found[place] = shard.get_tensor(name).clone()
                    else:
                        found[place] = shard.get_slice(name)[part]
        return [found[place] for place in range(len(wanted))]


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
