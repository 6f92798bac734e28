"""Reading the float weights of a Hugging Face directory, a few tensors at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantine.errors import CheckpointError

SINGLE: Final = "model.safetensors"
"""The weight file of a model that has only one."""
INDEX: Final = "model.safetensors.index.json"
"""The file that says which of several weight files holds which tensor."""


class Checkpoint:
    """Tensors of a directory of safetensors files, addressed by the model's parameter names.

    Files are opened for each read and closed after it, so nothing stays mapped.

    Args:
        directory: holds ``model.safetensors`` or ``model.safetensors.index.json`` with its shards.
        prefix: base-model prefix, which checkpoints of the bare model leave out.
        renames: ``(old, new)`` prefixes of tensor names.

    Raises:
        CheckpointError: no safetensors weights, a shard is missing, or a header is unreadable.
    """

    def __init__(
        self, directory: Path, prefix: str = "", renames: Iterable[tuple[str, str]] = ()
    ) -> None:
        self.directory = directory
        self._prefix = f"{prefix}." if prefix else ""
        self._renames = tuple(renames)
        self._file_of: dict[str, Path] = {}
        for file in weight_files(directory):
            with _opened(file) as shard:
                self._file_of.update(dict.fromkeys(shard.keys(), file))

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) is not None

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors ``names``, in their stored dtypes, as copies that own their memory.

        Raises:
            CheckpointError: a tensor is missing or its file unreadable.
        """
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name in names:
            stored = self._stored_name(name)
            if stored is None:
                raise CheckpointError(
                    f"{self.directory} holds no tensor {name}: the download may be incomplete, "
                    "or the weights belong to another architecture"
                )
            by_file.setdefault(self._file_of[stored], []).append((name, stored))
        tensors = {}
        for file, pairs in by_file.items():
            with _opened(file) as shard:
                for name, stored in pairs:
                    tensors[name] = shard.get_tensor(stored).clone()
        return tensors

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Shapes by name, of those of ``names`` that exist; only headers are read."""
        shapes = {}
        for name in names:
            stored = self._stored_name(name)
            if stored is not None:
                with _opened(self._file_of[stored]) as shard:
                    shapes[name] = tuple(shard.get_slice(stored).get_shape())
        return shapes

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which the tensor ``name`` is stored.

        Raises:
            CheckpointError: there is no such tensor, or it is not floating-point.
        """
        stored = self._stored_name(name)
        if stored is None:
            raise CheckpointError(f"{self.directory} holds no tensor {name}")
        with _opened(self._file_of[stored]) as shard:
            code = str(shard.get_slice(stored).get_dtype())
        dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
        if code not in {*dtypes, "BF16"}:
            raise CheckpointError(
                f"{name} is stored as {code}: only floating-point checkpoints can be quantized"
            )
        return dtypes.get(code, torch.bfloat16)

    def digest(self) -> str:
        """Hash of every tensor's name, dtype, shape and bytes, after checking each is finite.

        Raises:
            CheckpointError: a weight is not finite; nothing has been written yet.
        """
        total = hashlib.blake2b(digest_size=16)
        for name in sorted(self._file_of):
            with _opened(self._file_of[name]) as shard:
                tensor = shard.get_tensor(name)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise CheckpointError(
                        f"{name} in {self._file_of[name].name} holds non-finite weights: "
                        "the checkpoint is damaged or overflowed in its dtype"
                    )
                total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                total.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        return total.hexdigest()

    def _stored_name(self, name: str) -> str | None:
        candidates = [name, self._prefix + name, name.removeprefix(self._prefix)]
        for old, new in self._renames:
            if name.startswith(new):
                candidates.append(old + name.removeprefix(new))
        return next((c for c in candidates if c in self._file_of), None)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of ``directory``.

    Raises:
        CheckpointError: there are none, or the index names files that do not exist.
    """
    if (directory / INDEX).is_file():
        try:
            weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
            files = [directory / name for name in sorted(set(weight_map.values()))]
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{directory / INDEX} is damaged: download it again") from error
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{directory} is incomplete: {INDEX} names {len(files)} files, but "
                f"{', '.join(missing)} are missing; download the model again"
            )
        return files
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    pickles = [*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")]
    if pickles:
        raise CheckpointError(
            f"{directory} holds only pickled weights ({pickles[0].name}), which can run code when "
            "opened and are never read: convert them to safetensors first"
        )
    raise CheckpointError(f"{directory} holds neither {SINGLE} nor {INDEX}")


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}): it is damaged or half downloaded"
        ) from error
