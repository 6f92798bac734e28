"""Strings that end an answer, which arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Passes text on up to the first of several strings.

    What may be the beginning of one is held back until more of the text is there.

    Args:
        stops: the strings, none of them empty.

    Attributes:
        stopped: whether one of them was there.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """What can be passed on once ``text`` has arrived, too."""
        held = self._held + text
        found = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return held[: min(found)]
        kept = max((_beginning(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def rest(self) -> str:
        """What was held back, as no more text comes."""
        return self._held


def _beginning(text: str, stop: str) -> int:
    """Number of characters at the end of ``text`` with which ``stop`` begins."""
    most = min(len(stop) - 1, len(text))
    return next((count for count in range(most, 0, -1) if text.endswith(stop[:count])), 0)
