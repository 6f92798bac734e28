"""What the verbs of the command line share."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from quantine.errors import PlanError

MODEL_HELP: Final = "a Hugging Face directory, a .gguf file, a hub id, or `demo`"
DTYPES: Final = ("float32", "bfloat16", "float16")

Run = Callable[[argparse.Namespace], int | None]
"""Carries a verb out; the exit status, ``None`` for success."""


def add_verb(verbs: Any, name: str, run: Run, text: str, examples: str) -> argparse.ArgumentParser:
    """Add the verb ``name`` to the subparsers ``verbs``."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def names(text: str) -> list[str]:
    """The names in a list with commas."""
    return [name for name in text.split(",") if name]


def check_target(path: Path | None) -> None:
    """Refuse a file that cannot be written, before work starts.

    Raises:
        PlanError: its directory does not exist.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise PlanError(f"{path} cannot be written: there is no such directory")


def dump_json(path: Path | None, value: object) -> None:
    """Write ``value`` to ``path``, if there is one, with null for numbers that JSON lacks.

    Raises:
        PlanError: it cannot be written.
    """
    if path is not None:
        try:
            text = json.dumps(finite(value), indent=2, allow_nan=False)
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise PlanError(f"{path} cannot be written: {error}") from error


def finite(value: Any) -> Any:
    """``value`` with null for numbers that JSON does not have, such as an infinite perplexity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
