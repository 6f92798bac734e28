"""What a run has read of its source, so that it never mixes two versions of one model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantine.errors import CheckpointError


class ReadRecord:
    """Digests of the tensors that were read, and sizes and times of the files that hold them.

    Args:
        known: what an earlier process recorded, the result of `as_plain`.
    """

    def __init__(self, known: Mapping[str, Any] | None = None) -> None:
        self._digests: dict[str, str] = dict(known["tensors"]) if known else {}
        self._files: dict[str, list[int]] = dict(known["files"]) if known else {}

    def __contains__(self, name: str) -> bool:
        return name in self._digests

    def __getitem__(self, name: str) -> str:
        return self._digests[name]

    def names(self) -> list[str]:
        """The model's names of all tensors that were read."""
        return list(self._digests)

    def add(self, name: str, tensor: Tensor, file: Path) -> None:
        """Record a tensor that was just read, or compare it with what was read before.

        Args:
            name: what the model calls it.
            tensor: as its file stores it.
            file: that holds it.

        Raises:
            CheckpointError: it is not finite, or not what was read before.
        """
        check_finite(name, tensor, file)
        digest = tensor_digest(tensor)
        if self._digests.setdefault(name, digest) != digest:
            raise CheckpointError(
                f"{name} in {file} is not what this run read before: give the model as it was, or "
                "begin again"
            )

    def is_unchanged(self, file: Path) -> bool:
        """Whether ``file`` has the size and the time of change that were recorded."""
        return self._files.get(file.name) == _size_and_time(file)

    def look(self, file: Path) -> None:
        """Record size and time of change of ``file``, all of whose recorded tensors are right."""
        self._files[file.name] = _size_and_time(file)

    def as_plain(self) -> dict[str, Any]:
        """Everything as plain values for JSON; file names are relative to the model's directory."""
        return {"tensors": dict(self._digests), "files": dict(self._files)}


def check_finite(name: str, tensor: Tensor, file: Path) -> None:
    """Refuse a tensor of floats with NaN or infinity.

    Raises:
        CheckpointError: names it and its file.
    """
    if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor):
        raise CheckpointError(
            f"{name} in {file.name} holds non-finite weights: the checkpoint is damaged or "
            "overflowed in its dtype"
        )


def _is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite: in one pass, where `torch.isfinite` takes several."""
    low, high = tensor.aminmax()  # NaN if one value is NaN
    return math.isfinite(low) and math.isfinite(high)


def tensor_digest(tensor: Tensor) -> str:
    """Hash of a tensor's dtype, shape and bytes, BLAKE2b of 128 bits in hex."""
    found = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode(), digest_size=16)
    found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _size_and_time(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]
