"""What the parsers of several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Final

MODEL_HELP: Final = "a Hugging Face directory, a .gguf file, a hub id, or `demo`"
"""Help for the argument MODEL."""
DTYPES: Final = ("float32", "bfloat16", "float16")
"""What the option --dtype takes."""

Run = Callable[[argparse.Namespace], int | None]
"""Carries a verb out and returns the exit status, ``None`` for success."""


def add_verb(verbs: Any, name: str, run: Run, text: str, examples: str) -> argparse.ArgumentParser:
    """Add the verb ``name`` to the subparsers ``verbs``.

    Args:
        run: called with the parsed arguments.
        text: what the verb does, for lists of verbs and for its own help.
        examples: command lines for the end of its help, each indented by two spaces.

    Returns:
        The verb's parser, which has no arguments yet.
    """
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def comma_list(text: str) -> list[str]:
    """The parts of ``text`` between commas; empty ones are left out."""
    return [name for name in text.split(",") if name]
