"""Giving decoder blocks their weights one after another, with one block read ahead."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantine.calibrate.skeleton import fill, make_buffers, weight_names
from quantine.families.family import Family
from quantine.families.layers import block_list

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantine.source.checkpoint import Checkpoint


class BlockLoader:
    """Loads and releases the blocks of a model, and reads the next one while one is worked on.

    One thread reads ahead, never more than one block, in the dtypes in which the files store it. An
    error of the thread is raised by the `load` that needs what it read. A context: at its end the
    thread is gone. What is loaded does not depend on what was read ahead.

    Args:
        model: the model whose blocks get weights.
        family: its architecture.
        checkpoint: the files that weights are read from.
        device: device that the weights are put on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        checkpoint: Checkpoint,
        device: torch.device,
    ) -> None:
        self._model, self._checkpoint, self._device = model, checkpoint, device
        self._blocks, self._path = block_list(model, family), family.blocks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="quantine-read-ahead")
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None

    def __enter__(self) -> BlockLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self._ahead = None
        self._thread.shutdown(cancel_futures=True)

    def load(self, index: int, then: int | None = None) -> nn.Module:
        """Give block ``index`` its float32 weights, and begin to read those of another block.

        Args:
            index: number of the block.
            then: number of the block that will be loaded next; ``None`` reads nothing ahead.

        Returns:
            The block.

        Raises:
            CheckpointError: a tensor is missing or its file unreadable.
        """
        block = self._blocks[index]
        make_buffers(self._model, block, self._device)
        fill(self._model, self._taken(index), self._device)
        if then is not None:
            self._ahead = then, self._thread.submit(self._read, self._names(then))
        return block

    def release(self, index: int) -> None:
        """Drop the weights of block ``index`` and free their memory."""
        self._blocks[index].to("meta")

    def _taken(self, index: int) -> dict[str, Tensor]:
        """The tensors of block ``index``, read ahead or now; nothing read ahead is left."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            number, reading = ahead
            tensors = reading.result()
            if number == index:
                return tensors
        return self._read(self._names(index))

    def _names(self, index: int) -> list[str]:
        return weight_names(self._blocks[index], f"{self._path}.{index}")

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        """The tensors ``names``; for CUDA in page-locked memory, which it copies on its own."""
        tensors = self._checkpoint.read(names)
        if self._device.type == "cuda":
            return {name: tensors.pop(name).pin_memory() for name in names}
        return tensors
