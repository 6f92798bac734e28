"""What a run tells while it goes on, and how that is shown."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from quantine.core.process_memory import peak_memory

if TYPE_CHECKING:
    from rich.console import Console


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
