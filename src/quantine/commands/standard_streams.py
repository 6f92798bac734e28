"""Standard output and error of a command, which can fail like every other file."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import IO, Any, Final

from quantine.errors import OutputError

STANDARD: Final = 3
"""Number of standard streams: files with lower numbers are input, output and error."""


class CheckedStream:
    """A standard stream whose failures are errors of quantine, with one sentence.

    A reader that has gone, such as ``head``, is no failure: what is written from then on is lost,
    and the command goes on. In all else it is the stream that it wraps.

    Args:
        stream: the stream; ``None`` if it was closed when the program began.
        name: what messages call it.
    """

    def __init__(self, stream: IO[str] | None, name: str) -> None:
        self._stream = stream
        self._name = name

    def write(self, text: str) -> int:
        """Write ``text`` and return its length.

        Raises:
            OutputError: the stream cannot be written.
        """
        if self._stream is None:
            raise OutputError(f"{self._name} is closed: open it, or send it to a file")
        with self._checked():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand over all that was written.

        Raises:
            OutputError: the stream cannot be written.
        """
        if self._stream is not None:
            with self._checked():
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self._silence()
        except OSError as error:
            self._silence()
            raise OutputError(
                f"{self._name} cannot be written: {error.strerror}: send it elsewhere"
            ) from error

    def _silence(self) -> None:
        """Let what is still in buffers, and all that follows, be lost without another failure."""
        null = os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(OSError):  # a stream that is no file of the system
            os.dup2(null, self.fileno())
        os.close(null)


@contextlib.contextmanager
def checked_streams() -> Iterator[None]:
    """A context in which standard output and error neither fail unseen nor on any character.

    Characters that the terminal's encoding lacks are replaced. Files that are opened later do not
    take the numbers of streams that are closed, so that nobody prints into them.
    """
    _take_numbers()
    output, error = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        for stream in (output, error):
            stack.enter_context(_forgiving(stream))
        sys.stdout = CheckedStream(output, "standard output")
        # Whoever closes standard error wants to hear nothing.
        told = error or stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        sys.stderr = CheckedStream(told, "standard error")
        try:
            yield
        finally:
            sys.stdout, sys.stderr = output, error


@contextlib.contextmanager
def _forgiving(stream: Any) -> Iterator[None]:
    """A context in which ``stream`` replaces characters that its encoding lacks."""
    strict = getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure")
    if strict:
        stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        if strict:
            stream.reconfigure(errors="strict")


def _take_numbers() -> None:
    """Open the null device in place of every standard stream that is closed."""
    number = 0
    while number < STANDARD:
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)
