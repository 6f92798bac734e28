"""Whether this process is one of several, by the environment that torchrun sets."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

from quantine.errors import BackendUnavailable, PlanError, cut, shown
from quantine.ranks.ranks import ALONE, Ranks

JOINING: Final = timedelta(minutes=5)
"""How long ranks wait for each other to begin."""
PATIENCE: Final = timedelta(days=7)
"""How long a rank waits for what another one computes; see `quantine.ranks.pulse` for one that
hangs. One that ends is noticed at once."""


@contextmanager
def started(device: str) -> Iterator[tuple[Ranks, str]]:
    """The ranks of this run in a context that tells all of them when one fails.

    Nothing is done in a process that was not started as one of several: torch.distributed is not
    imported.

    Args:
        device: name of a device; ``auto`` and ``cuda`` are another GPU for each rank of a machine.

    Returns:
        The ranks, and the name of this rank's device.

    Raises:
        PlanError: the environment names several ranks, but not what connects them.
        BackendUnavailable: ranks cannot be connected.
        RankError: inside of the context, a rank is gone.
        SystemExit: inside of the context, another rank has said why the run ends.
    """
    if _number("WORLD_SIZE", 1) == 1:
        yield ALONE, device
        return
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    from quantine.ranks.ending import Ending
    from quantine.ranks.torch_ranks import TorchRanks

    store, index, count = _joined()
    ending = Ending(PrefixStore("ending", store), index, count)
    before = signal.signal(signal.SIGTERM, lambda *_: ending.signalled())
    try:
        ending.pulse.begin(JOINING)
        own, tensors = _connected(PrefixStore("groups", store), index, count, device)
        yield TorchRanks(ending, tensors), own
        ending.pulse.end()
        dist.destroy_process_group()
    except BaseException as error:
        # Signals stay in its hands: torchrun's must not end this rank before it has said why.
        end = ending.said(error)
        if end is error:
            raise
        raise end from error
    signal.signal(signal.SIGTERM, before)


def _joined() -> tuple[Any, int, int]:
    """The store that ranks share, this one's number, and how many there are."""
    import torch.distributed as dist

    if not dist.is_available():
        raise BackendUnavailable("this PyTorch has no torch.distributed: run one process")
    from torch.distributed.rendezvous import rendezvous

    try:
        store, index, count = next(rendezvous("env://", timeout=JOINING))
    except ValueError as error:
        raise PlanError(
            f"WORLD_SIZE is set, but not all that connects ranks ({cut(error)}): start them with "
            "torchrun, or unset it"
        ) from error
    except RuntimeError as error:
        raise BackendUnavailable(f"ranks do not find each other: {cut(error)}") from error
    return store, int(index), int(count)


def _connected(store: Any, index: int, count: int, device: str) -> tuple[str, Any]:
    """Connect the ranks; returns the name of this one's device, and the group for its tensors.

    Each rank of a machine has a GPU of its own, and NCCL sends tensors between them, unless the
    device is named with a number: then all ranks share it.
    """
    import torch
    import torch.distributed as dist

    own = gpu_of_rank(device, index)
    dist.init_process_group("gloo", store=store, rank=index, world_size=count, timeout=PATIENCE)
    if own is None:
        return device, None
    torch.cuda.set_device(own)
    return own, dist.new_group(backend="nccl", timeout=PATIENCE)


def gpu_of_rank(device: str, index: int) -> str | None:
    """The GPU that a rank has for itself; ``None`` where ranks share a device, or the CPU.

    Args:
        device: name of a device, as for `started`.
        index: number of the rank, which is its number on its machine unless ``LOCAL_RANK`` is set.

    Raises:
        BackendUnavailable: the machine has fewer GPUs than ranks.
    """
    import torch

    nvidia = torch.cuda.is_available() and torch.version.hip is None
    if device != "cuda" and not (device == "auto" and nvidia):
        return None
    number, found = _number("LOCAL_RANK", index), torch.cuda.device_count()
    if number >= found:
        raise BackendUnavailable(
            f"rank {index} has no GPU of its own among {found}: start fewer ranks here, or name "
            "one device for all, such as cuda:0"
        )
    return f"cuda:{number}"


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or (name == "WORLD_SIZE" and value == "0"):
        raise PlanError(f"{name} is {shown(value)}, not a number of ranks: start with torchrun")
    return int(value)
