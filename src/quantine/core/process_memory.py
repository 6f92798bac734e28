"""Memory of this process: how much it took at most, and giving back what was freed."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    pass

STATUS: Final = Path("/proc/self/status")


M_TRIM_THRESHOLD: Final = -1


RESET: Final = Path("/proc/self/clear_refs")


M_MMAP_THRESHOLD: Final = -3


LARGE_TENSOR: Final = 2**25
"""Bytes; the largest limit that glibc takes."""


KEPT_FREE: Final = 2**28
"""Freed bytes at the end of the heap that stay until `return_freed_memory`."""


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    # What getrusage says of a new process includes the one that started it.
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak_memory() -> None:
    """Let `peak_memory` count from now on, where the system can (Linux)."""
    if RESET.exists():
        RESET.write_text("5")


def reuse_freed_memory() -> None:
    """Let tensors take the memory of those that were freed before.

    Without it each one of some megabytes gets fresh pages from the system, which takes longer than
    most of what is computed on them.
    """
    if _has_glibc():
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_TENSOR)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, KEPT_FREE)


def return_freed_memory() -> None:
    """Give freed memory back to the system, also from between what is still used.

    The heap fragments: without it a run's memory would grow from block to block. glibc before 2.39
    (its bug 30723) often cannot give the place of a freed tensor to the next one of that size.
    """
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _has_glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")
