"""Hidden states between two decoder blocks: in memory, in files, or in both."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

NAME: Final = "hidden"
"""What files call the tensor with a batch."""


class HiddenStates:
    """A sequence of batches of hidden states, each ``[batch, tokens, width]`` float32.

    Batches are read and written by number, and have to be written before they are read. A file
    exists whole or not at all, and says which block its batch enters, so that another process can
    go on from any moment: see `restore`.

    Args:
        batches: number of batches.
        directory: directory that holds each batch in a file, made if missing; ``None`` keeps
            batches in memory alone.
        device: device that batches are put on when they are read.
        kept_on: device of batches that are kept in memory; ``None`` leaves them where they are.
        in_memory: whether batches are kept in memory although ``directory`` holds them.
        before: number of the batches in ``directory`` that come before these, and are others'.
    """

    def __init__(
        self,
        batches: int,
        directory: Path | None,
        device: torch.device | str = "cpu",
        kept_on: torch.device | None = None,
        in_memory: bool = False,
        before: int = 0,
    ) -> None:
        self._kept: list[Tensor | None] = [None] * batches
        self._enters = [0] * batches
        self._directory, self._device, self._kept_on = directory, device, kept_on
        self._in_memory, self._before = in_memory or directory is None, before
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Tensor:
        if not self._in_memory:
            return _read(self._file(index))[0].to(self._device)
        kept = self._kept[index]
        if kept is None:
            raise IndexError(f"batch {index} has not been stored")
        return kept if self._kept_on is None else kept.to(self._device)

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        self.put(index, hidden, self._enters[index])

    def put(self, index: int, hidden: Tensor, enters: int) -> None:
        """Store batch ``index``, which enters block number ``enters`` next."""
        if self._directory is not None:
            _write(self._file(index), hidden, enters)
        self._enters[index] = enters
        self._keep(index, hidden)

    def copied(self, directory: Path) -> HiddenStates:
        """A copy of all batches in the files of another directory."""
        copy = HiddenStates(len(self), directory, self._device)
        for batch in range(len(self)):
            copy[batch] = self[batch]
        return copy

    def enters(self, index: int) -> int:
        """Number of the block that batch ``index`` enters next."""
        return self._enters[index]

    def restore(self, samples: Sequence[int], like: Tensor, done: int) -> str | None:
        """Take over what an earlier process left in the directory, if it is whole and right.

        Args:
            samples: number of segments in each batch.
            like: hidden states of one batch, whose shape but for the segments, and whose dtype, all
                must have.
            done: number of blocks that are finished; none of the batches may be further.

        Returns:
            ``None`` if every batch was taken over, else what is wrong with the first that is not.
            Then all must be written again.
        """
        found: list[int] = []
        for index, count in enumerate(samples):
            try:
                hidden, enters = _checked(self._file(index))
            except (SafetensorError, OSError, ValueError, LookupError) as error:
                missing = isinstance(error, FileNotFoundError)
                return "are missing" if missing else f"are damaged ({self._file(index).name})"
            if hidden.dtype != like.dtype or hidden.shape != (count, *like.shape[1:]):
                return f"have another shape or dtype ({self._file(index).name})"
            if not 0 <= enters <= done:
                return f"enter block {enters}, but {done} blocks are finished"
            found.append(enters)
            self._keep(index, hidden.to(self._device))
        self._enters = found
        return None

    def _keep(self, index: int, hidden: Tensor) -> None:
        if self._in_memory:
            self._kept[index] = hidden if self._kept_on is None else hidden.to(self._kept_on)

    def _file(self, index: int) -> Path:
        assert self._directory is not None
        return self._directory / f"{self._before + index:06}.safetensors"


def _write(path: Path, hidden: Tensor, enters: int) -> None:
    """Write a batch; a process that is killed meanwhile leaves the file that was there before.

    It is not forced to the disk: what a failure of power loses is found by the digest.
    """
    stored = hidden.detach().cpu().contiguous()
    facts = {"enters": str(enters), "digest": _digest(stored)}
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(save({NAME: stored}, metadata=facts))
    temporary.replace(path)


def _read(path: Path) -> tuple[Tensor, dict[str, str]]:
    """The batch in a file, and what the file says of it."""
    path.stat()  # which has an error of its own where there is no file
    with safe_open(path, framework="pt") as file:
        # Cloned into torch's alignment: matrix products then round as they do in memory.
        return file.get_tensor(NAME).clone(), dict(file.metadata() or {})


def _checked(path: Path) -> tuple[Tensor, int]:
    """The batch in a file, and the number of the block that it enters.

    Raises:
        ValueError: its bytes are not those that were written.
    """
    hidden, facts = _read(path)
    if facts["digest"] != _digest(hidden):
        raise ValueError(f"{path} has other bytes than were written")
    return hidden, int(facts["enters"])


def _digest(hidden: Tensor) -> str:
    return hashlib.blake2b(hidden.view(torch.uint8).numpy().data, digest_size=16).hexdigest()
