"""Metadata of a GGUF file that are taken out one by one: what is left was not understood."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from quantine.errors import CheckpointError


class Metadata:
    """What a GGUF file says under the prefix of its architecture.

    Args:
        path: of the file, for messages.
        values: values by key, without the prefix.

    Attributes:
        path: of the file.
        rest: the values that nobody took yet.
    """

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.rest = dict(values)

    def count(self, key: str, default: int | None = None) -> int:
        """Take a whole number above 0, which must be there if it has no ``default``.

        Raises:
            CheckpointError: it is missing or something else.
        """
        value = self.number(key, default)
        if not isinstance(value, int):
            raise CheckpointError(f"{self.path} has {key} = {value}, but it must be a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Take a number above 0, which must be there if it has no ``default``.

        Raises:
            CheckpointError: it is missing or something else.
        """
        value = self.rest.pop(key, default)
        if value is None:
            raise CheckpointError(f"{self.path} is damaged: its metadata have no {key}")
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or not 0 < value < math.inf:
            said = value if numeric else type(value).__name__
            raise CheckpointError(
                f"{self.path} has {key} = {said}, but it must be a number above 0"
            )
        found: float = value
        return found

    def text(self, key: str, default: str) -> str:
        """Take a text.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.rest.pop(key, default)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.path} has a {key} that is not text")
        return value
