"""Hidden states between two blocks: in memory, or on disk past a limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class HiddenStates:
    """Batches of hidden states ``[batch, tokens, width]`` float32, each replaced in place.

    Args:
        batches: number of batches.
        directory: where batches are kept as files; ``None`` keeps them in memory.
        device: where they are read to from files.
    """

    def __init__(
        self, batches: int, directory: Path | None, device: torch.device | str = "cpu"
    ) -> None:
        self._kept: list[Tensor | None] = [None] * batches
        self._directory, self._device = directory, device
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
        return kept

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        if self._directory is not None:
            np.save(self._file(index), hidden.cpu().numpy(), allow_pickle=False)
        else:
            self._kept[index] = hidden

    def _file(self, index: int) -> Path:
        assert self._directory is not None
        return self._directory / f"{index:06}.npy"
