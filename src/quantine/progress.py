"""What a run tells while it goes on, and how that is shown."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from rich.console import Console

STATUS: Final = Path("/proc/self/status")
M_TRIM_THRESHOLD: Final = -1
RESET: Final = Path("/proc/self/clear_refs")
M_MMAP_THRESHOLD: Final = -3
LARGE_TENSOR: Final = 2**25
"""Bytes; the largest limit that glibc takes."""
KEPT_FREE: Final = 2**28
"""Freed bytes at the end of the heap that stay until `return_freed_memory`."""


class Progress(Protocol):
    """Receives the events of a run."""

    def note(self, text: str) -> None:
        """Something worth a line."""
        ...

    def start(self, blocks: int, done: int) -> None:
        """The loop over ``blocks`` blocks begins; ``done`` of them are finished from before."""
        ...

    def layer(self, report: dict[str, Any]) -> None:
        """A layer is solved; its entry in the report."""
        ...

    def block(self, index: int) -> None:
        """Block ``index`` is complete."""
        ...

    def finish(self, report: dict[str, Any]) -> None:
        """The directory is complete; the whole report."""
        ...


class Silent:
    """Shows nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def start(self, blocks: int, done: int) -> None:
        """Nothing."""

    def layer(self, report: dict[str, Any]) -> None:
        """Nothing."""

    def block(self, index: int) -> None:
        """Nothing."""

    def finish(self, report: dict[str, Any]) -> None:
        """Nothing."""


class Shown:
    """A live line on a terminal, one plain line per block elsewhere.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self._console = console
        self._meter = Meter()
        self._bar = Bar(
            TextColumn("block {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(text)

    def start(self, blocks: int, done: int) -> None:
        """Start the bar."""
        self._meter.start(blocks)
        if done:
            self.note(f"{done} of {blocks} blocks are finished already")
        self._bar.update(self._task, total=blocks)
        self._bar.start()

    def layer(self, report: dict[str, Any]) -> None:
        """Show the layer's name and error."""
        self._meter.layer(report)
        name = report["name"]
        self._bar.update(self._task, description=f"{self._meter.line()}  {name}")

    def block(self, index: int) -> None:
        """Advance the bar, or print a line."""
        self._meter.block()
        self._bar.update(self._task, completed=index + 1, description=self._meter.line())
        if not self._console.is_terminal:
            self.note(f"block {index + 1}/{self._meter.blocks}  {self._meter.line()}")

    def finish(self, report: dict[str, Any]) -> None:
        """Remove the bar."""
        self.stop()

    def stop(self) -> None:
        """Remove the bar, also after an error."""
        self._bar.stop()


class Meter:
    """Error so far, time left, memory: what a progress line says."""

    def __init__(self) -> None:
        self.blocks = 0
        self._left = 0
        self._timed = 0
        self._began = time.perf_counter()
        self._errors: list[float] = []

    def start(self, blocks: int) -> None:
        """Begin timing."""
        self.blocks, self._left = blocks, blocks
        self._began = time.perf_counter()

    def layer(self, report: dict[str, Any]) -> None:
        """Count a layer's output error."""
        if report["output_error"] is not None:
            self._errors.append(report["output_error"])

    def block(self) -> None:
        """Count a block."""
        self._timed += 1
        self._left -= 1

    def line(self) -> str:
        """One line of text."""
        spent = time.perf_counter() - self._began
        left = f"{spent / self._timed * self._left:.0f} s left" if self._timed else "timing"
        mean = sum(self._errors) / len(self._errors) if self._errors else None
        error = "error not measured" if mean is None else f"mean error {mean:.2%}"
        return f"{error}, {peak_memory() / 1e9:.2f} GB peak, {left}"


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
