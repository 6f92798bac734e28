"""Hidden states between two decoder blocks, kept in memory or in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class HiddenStates:
    """A sequence of batches of hidden states, each ``[batch, tokens, width]`` float32.

    Batches are read and written by number, and have to be written before they are read.

    Args:
        batches: number of batches.
        directory: directory that holds each batch in a file, made if missing; ``None`` keeps
            batches in memory.
        device: device that batches are put on when they are read.
        kept_on: device of batches that are kept in memory; ``None`` leaves them where they are.
    """

    def __init__(
        self,
        batches: int,
        directory: Path | None,
        device: torch.device | str = "cpu",
        kept_on: torch.device | None = None,
    ) -> None:
        self._kept: list[Tensor | None] = [None] * batches
        self._directory, self._device, self._kept_on = directory, device, kept_on
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Tensor:
        if self._directory is not None:
            # Cloned into torch's alignment: matrix products then round as they do in memory.
            read = torch.from_numpy(np.load(self._file(index), allow_pickle=False))
            return read.clone().to(self._device)
        kept = self._kept[index]
        if kept is None:
            raise IndexError(f"batch {index} has not been stored")
        return kept if self._kept_on is None else kept.to(self._device)

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        if self._directory is not None:
            np.save(self._file(index), hidden.cpu().numpy(), allow_pickle=False)
        else:
            self._kept[index] = hidden if self._kept_on is None else hidden.to(self._kept_on)

    def _file(self, index: int) -> Path:
        assert self._directory is not None
        return self._directory / f"{index:06}.npy"
