"""The fields of a request, each checked: what is not understood is refused by name.

Of fields that ask for what this server does not have, values are taken that ask for nothing: many
clients send them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from quantine.errors import shown
from quantine.server.refusal import Refusal

MOST_STOPS: Final = 16
"""Stop strings of one request at most."""

NOTHING: Final[Mapping[str, tuple[Any, ...]]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Values, by field, that change nothing; all others are refused."""
UNUSED: Final = frozenset({"metadata", "safety_identifier", "user"})
"""Fields that do not speak of the answer."""


class Fields:
    """The fields of a request; each that is read is one that is understood.

    Args:
        body: the content of the request.

    Raises:
        Refusal: it is no JSON object.
    """

    def __init__(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise Refusal("the request must be a JSON object")
        # null stands for a field that is left out.
        self._given = {key: value for key, value in body.items() if value is not None}
        self._read: set[str] = set()

    def take(self, name: str, is_right: Callable[[Any], bool], wanted: str) -> Any:
        """The value of a field; ``None`` if it is left out.

        Args:
            name: of the field.
            is_right: whether a value may stand there.
            wanted: what may stand there, for the message.

        Raises:
            Refusal: another value stands there.
        """
        self._read.add(name)
        value = self._given.get(name)
        if value is not None and not is_right(value):
            raise Refusal(f"{name} must be {wanted}, not {shown(value)}", name)
        return value

    def number(self, name: str, least: float, most: float, default: float) -> float:
        """A number from ``least`` to ``most``."""

        def is_right(value: Any) -> bool:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            return is_number and least <= value <= most

        value = self.take(name, is_right, f"a number from {least:g} to {most:g}")
        return default if value is None else float(value)

    def count(self, name: str, least: int, most: int) -> int | None:
        """A whole number from ``least`` to ``most``; ``None`` if it is left out."""

        def is_right(value: Any) -> bool:
            return type(value) is int and least <= value <= most

        found: int | None = self.take(name, is_right, f"a whole number from {least} to {most}")
        return found

    def switch(self, name: str) -> bool:
        """``true`` or ``false``; the latter if it is left out."""
        return bool(self.take(name, lambda value: isinstance(value, bool), "true or false"))

    def stops(self) -> tuple[str, ...]:
        """The strings that end an answer."""

        def is_right(value: Any) -> bool:
            stops = [value] if isinstance(value, str) else value
            listed = isinstance(stops, list) and len(stops) <= MOST_STOPS
            return listed and all(isinstance(stop, str) and stop for stop in stops)

        value = self.take("stop", is_right, f"a string, or at most {MOST_STOPS}, none empty")
        return (value,) if isinstance(value, str) else tuple(value or ())

    def finish(self) -> None:
        """Refuse all fields that nobody has read, but for those that ask for nothing.

        Raises:
            Refusal: names the field.
        """
        for name in sorted(self._given.keys() - self._read - UNUSED):
            value = self._given[name]
            if name not in NOTHING:
                raise Refusal(f"{name} is not known here: leave it out", name, "unknown_parameter")
            if not any(_is_same(value, nothing) for nothing in NOTHING[name]):
                raise Refusal(
                    f"{name} cannot be {shown(value)} here: leave it out",
                    name,
                    "unsupported_parameter",
                )


def _is_same(value: Any, other: Any) -> bool:
    """Whether two values of JSON are the same; in Python ``False`` would be 0."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
