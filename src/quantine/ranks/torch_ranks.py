"""Several processes of a run, connected by torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from quantine.errors import RankError
from quantine.ranks.ending import Ending
from quantine.ranks.ranks import Ranks, add_to

T = TypeVar("T")


class TorchRanks(Ranks):
    """A process among several, in the default group of torch.distributed, which uses gloo.

    A rank that does not answer, because it was killed, failed or hangs, is a `RankError` of those
    that wait for it.

    Args:
        ending: finds out what has become of the others.
        tensors: a group of the same ranks that tensors on GPUs are sent in; ``None`` sends them by
            way of the CPU's memory.
    """

    def __init__(self, ending: Ending, tensors: Any = None) -> None:
        self.index, self.count = dist.get_rank(), dist.get_world_size()
        self._ending, self._tensors = ending, tensors

    def of_rank(self, rank: int, make: Callable[[], T]) -> T:
        """What ``make`` gives on ``rank``, on every rank; it is sent by pickling it."""
        made: list[Any] = [make() if rank == self.index else None]
        with self._talking():
            dist.broadcast_object_list(made, rank)
        result: T = made[0]
        return result

    def gather(self, value: T) -> list[T]:
        """The ``value`` of each rank, on every rank; they are sent by pickling them."""
        found: list[Any] = [None] * self.count
        with self._talking():
            dist.all_gather_object(found, value)
        return found

    def total(self, parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
        """The sums of the parts of all ranks: each adds its own to what the rank before sends.

        The first rank adds its parts as they come; the others hold all of theirs until then.
        """
        # Computing the parts fails here, and is not taken for ranks that do not answer.
        own = [super().total(parts)] if self.first else [list(part) for part in parts]
        device = own[0][0].device
        sendable = [[self._sendable(tensor) for tensor in part] for part in own]
        with self._talking():
            if self._tensors is not None:
                dist.barrier()  # who waits for NCCL is not told of a rank that was lost
            if self.first:
                (sums,) = sendable
            else:
                sums = [torch.empty_like(tensor) for tensor in sendable[0]]
                for total in sums:
                    dist.recv(total, self.index - 1, group=self._tensors)
                add_to(sums, sendable)
            if self.index + 1 < self.count:
                for total in sums:
                    dist.send(total, self.index + 1, group=self._tensors)
            for total in sums:
                dist.broadcast(total, self.count - 1, group=self._tensors)
        return [total.to(device) for total in sums]

    def meet(self) -> None:
        """Wait until all ranks have come here."""
        with self._talking():
            dist.barrier()

    def _sendable(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous() if self._tensors is not None else tensor.cpu().contiguous()

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Errors of torch.distributed in this context are those of ranks that do not answer."""
        try:
            yield
        except RuntimeError as error:
            raise RankError(self._ending.lost(error)) from error
