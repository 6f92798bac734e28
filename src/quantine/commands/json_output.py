"""The file that the option --json names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from quantine.errors import PlanError


def check_writable(path: Path | None) -> None:
    """Refuse a file that cannot be written, before work starts; ``None`` is no file.

    Raises:
        PlanError: its directory does not exist.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise PlanError(f"{path} cannot be written: there is no such directory")


def write_json_output(path: Path | None, value: object) -> None:
    """Write ``value`` to ``path``, with null for numbers that JSON lacks; ``None`` is no file.

    Raises:
        OutputError: it cannot be written.
    """
    if path is not None:
        from quantine.formats.directory import writing

        text = json.dumps(json_numbers(value), indent=2, allow_nan=False)
        with writing(path):
            path.write_text(text + "\n", encoding="utf-8")


def json_numbers(value: Any) -> Any:
    """``value`` with null for numbers that JSON lacks, such as an infinite perplexity."""
    if isinstance(value, dict):
        return {key: json_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
