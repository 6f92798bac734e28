"""Blocks that are tuned already, on disk: a run that was stopped goes on after them."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from quantine.formats.shards import write_tensors
from quantine.tuning.part import Snapshot


class KeptBlocks:
    """The tuned numbers and codes of blocks, a file for each block.

    They are worth something only to a run with the same model, text and plan, whose blocks were
    solved to the same numbers: the directory belongs to one run.

    Args:
        directory: made with the first file.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, index: int, snapshot: Snapshot) -> None:
        """Keep what block ``index`` is tuned to; a crash leaves the whole file or none."""
        self._directory.mkdir(parents=True, exist_ok=True)
        kinds = {"leaf": snapshot.leaves, "codes": snapshot.codes}
        tensors = {
            f"{kind}.{number:05}": tensor.cpu().contiguous()
            for kind, found in kinds.items()
            for number, tensor in enumerate(found)
        }
        write_tensors(self._file(index), tensors)

    def read(self, index: int) -> Snapshot | None:
        """What `write` was given for block ``index``, on the CPU; ``None`` if it was not."""
        if not self._file(index).is_file():
            return None
        tensors = load_file(self._file(index))
        leaves, codes = (
            [tensors[name] for name in sorted(tensors) if name.startswith(kind)]
            for kind in ("leaf", "codes")
        )
        return Snapshot(leaves, codes)

    def _file(self, index: int) -> Path:
        return self._directory / f"block-{index:05}.safetensors"
