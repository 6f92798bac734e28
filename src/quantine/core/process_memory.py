"""Memory of this process: its peak, and how freed memory is reused and returned."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path
from typing import Final

STATUS: Final = Path("/proc/self/status")
"""File in which Linux tells about this process, its peak memory included."""


M_TRIM_THRESHOLD: Final = -1
"""Number of glibc's ``mallopt`` option for the free memory that stays at the end of the heap."""


RESET: Final = Path("/proc/self/clear_refs")
"""File through which Linux resets the peak memory of this process."""


M_MMAP_THRESHOLD: Final = -3
"""Number of glibc's ``mallopt`` option for the size from which on an allocation gets pages of its
own."""


LARGE_TENSOR: Final = 2**25
"""Size in bytes from which on an allocation still gets pages of its own: the largest limit that
glibc takes."""


MALLINFO: Final = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)
"""Fields of what glibc's ``mallinfo2`` returns; ``fordblks`` are the free bytes."""


KEPT_FREE: Final = 2**28
"""Bytes of freed memory that stay at the end of the heap until `return_freed_memory` is called."""


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    # The peak that getrusage gives a new process includes that of the process that started it.
    found = _status("VmHWM")
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int | None:
    """The resident memory of this process now, in bytes; ``None`` where no file tells (Linux)."""
    return _status("VmRSS")


def _status(field: str) -> int | None:
    """A size in bytes that the system tells about this process; ``None`` where it does not."""
    if not STATUS.is_file():
        return None
    for line in STATUS.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


def forget_peak_memory() -> None:
    """Make `peak_memory` start again from the memory used now, where the system can (Linux)."""
    if RESET.exists():
        RESET.write_text("5", encoding="utf-8")


def reuse_freed_memory() -> None:
    """Make new tensors reuse the memory of freed ones; does something with glibc only.

    Otherwise each tensor of some megabytes gets fresh pages from the system, which takes longer
    than most of what is computed on it.
    """
    if _has_glibc():
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_TENSOR)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, KEPT_FREE)


def return_freed_memory(least: int = 0) -> None:
    """Give freed memory back to the system, also from gaps in the heap; with glibc only.

    The heap fragments: without it a run's memory would grow from block to block. glibc before 2.39
    (its bug 30723) often cannot give the place of a freed tensor to the next one of that size.

    Args:
        least: bytes; nothing is done while less than that is free in the heap.
    """
    if _has_glibc() and (not least or _freed_memory() >= least):
        ctypes.CDLL(None).malloc_trim(0)


class _Mallinfo(ctypes.Structure):
    """What glibc's ``mallinfo2`` returns, see mallinfo(3)."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in MALLINFO)


def _freed_memory() -> int:
    """Bytes of the heap that nothing uses; 0 where glibc does not tell (before 2.33)."""
    tell = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if tell is None:
        return 0
    tell.restype = _Mallinfo
    return int(tell().fordblks)


def _has_glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")
