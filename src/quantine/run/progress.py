"""The events of a run, and how they are shown."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from quantine.core.process_memory import peak_memory

if TYPE_CHECKING:
    from rich.console import Console


class Progress(Protocol):
    """Receives the events of a run, in the order in which they happen."""

    def note(self, text: str) -> None:
        """Receive a message for the user, one line."""
        ...

    def start(self, blocks: int, done: int) -> None:
        """Receive, first, the number of blocks, and how many an earlier process finished."""
        ...

    def layer(self, report: dict[str, Any]) -> None:
        """Receive the entry in the report of a layer that was just solved."""
        ...

    def block(self, index: int) -> None:
        """Receive the number, from 0, of a block that is now complete."""
        ...

    def finish(self, report: dict[str, Any]) -> None:
        """Receive the whole report once the output directory is complete."""
        ...


class Silent:
    """Progress that is not shown: every event is ignored."""

    def note(self, text: str) -> None:
        """Ignore the message; nothing is printed."""

    def start(self, blocks: int, done: int) -> None:
        """Ignore the number of blocks."""

    def layer(self, report: dict[str, Any]) -> None:
        """Ignore the entry of a solved layer."""

    def block(self, index: int) -> None:
        """Ignore the number of a complete block."""

    def finish(self, report: dict[str, Any]) -> None:
        """Ignore the final report."""


class Shown:
    """Progress as a live line on a terminal, or as one plain line per block elsewhere.

    Args:
        console: where it is printed.
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
        """Print the message as a line of its own."""
        self._console.print(text)

    def start(self, blocks: int, done: int) -> None:
        """Start the progress bar, and say how many blocks are finished already."""
        self._meter.start(blocks, blocks - done)
        if done:
            self.note(f"{done} of {blocks} blocks are finished already")
        self._bar.update(self._task, total=blocks)
        self._bar.start()

    def layer(self, report: dict[str, Any]) -> None:
        """Show the layer's name and the mean error so far in the live line."""
        self._meter.layer(report)
        name = report["name"]
        self._bar.update(self._task, description=f"{self._meter.line()}  {name}")

    def block(self, index: int) -> None:
        """Advance the progress bar, or print a line where there is no terminal."""
        self._meter.block()
        self._bar.update(self._task, completed=index + 1, description=self._meter.line())
        if not self._console.is_terminal:
            self.note(f"block {index + 1}/{self._meter.blocks}  {self._meter.line()}")

    def finish(self, report: dict[str, Any]) -> None:
        """Remove the progress bar at the end of the run."""
        self.stop()

    def stop(self) -> None:
        """Remove the progress bar; to be called also after an error."""
        self._bar.stop()


class Meter:
    """Computes the text of a progress line: mean error so far, peak memory, time left."""

    def __init__(self) -> None:
        self.blocks = 0
        self._left = 0
        self._timed = 0
        self._began = time.perf_counter()
        self._errors: list[float] = []

    def start(self, blocks: int, left: int) -> None:
        """Start the clock for a run of ``blocks`` blocks, of which ``left`` are to be done."""
        self.blocks, self._left = blocks, left
        self._began = time.perf_counter()

    def layer(self, report: dict[str, Any]) -> None:
        """Add the output error of a layer, from its entry in the report, to the mean."""
        if report["output_error"] is not None:
            self._errors.append(report["output_error"])

    def block(self) -> None:
        """Count a complete block, for the estimate of the time left."""
        self._timed += 1
        self._left -= 1

    def line(self) -> str:
        """The text: mean error, peak memory in GB (1e9 bytes), seconds left."""
        spent = time.perf_counter() - self._began
        left = f"{spent / self._timed * self._left:.0f} s left" if self._timed else "timing"
        mean = sum(self._errors) / len(self._errors) if self._errors else None
        error = "error not measured" if mean is None else f"mean error {mean:.2%}"
        return f"{error}, {peak_memory() / 1e9:.2f} GB peak, {left}"
