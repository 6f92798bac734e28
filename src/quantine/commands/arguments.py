"""What the parsers of several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Final

from quantine.calibrate.bos import BOS_CHOICES, BOS_DEFAULT

MODEL_HELP: Final = "a Hugging Face directory, a .gguf file, a hub id, or `demo`"
"""Help for the argument MODEL."""
TEXT_FILES_HELP: Final = (
    "a .txt (verbatim), .json, .jsonl or .parquet file, each also .gz or .zst; FILE:FIELD names "
    "the field with the text, else text, messages or conversations"
)
"""Help for files of text."""
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


def add_bos(parser: argparse.ArgumentParser, pieces: str) -> None:
    """Add the option that says which ``pieces`` of text begin as the tokenizer begins a text."""
    parser.add_argument(
        "--bos",
        choices=BOS_CHOICES,
        default=BOS_DEFAULT,
        help=f"which {pieces} begin with what the tokenizer puts before a text: each, as in use "
        "(default), or only the first of a text, as in papers",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option that says on which device is computed."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1 or another of PyTorch's devices; auto (default) is cuda where "
        "there is one, else cpu",
    )


def add_shards(parser: argparse.ArgumentParser) -> None:
    """Add the option that says in how many parts statistics of the text are summed."""
    parser.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="parts of the text that are summed one after another, so that as many processes of "
        "torchrun, or fewer, give the same bytes; default one for each process",
    )


def shards_of(arguments: argparse.Namespace, ranks: int = 1) -> int:
    """The number of shards that `add_shards` was given, else one for each of ``ranks``.

    There are at most as many as samples.
    """
    given: int | None = arguments.shards
    return max(1, min(ranks, arguments.samples)) if given is None else given


def comma_list(text: str) -> list[str]:
    """The parts of ``text`` between commas; empty ones are left out."""
    return [name for name in text.split(",") if name]
