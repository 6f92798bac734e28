"""The tokenizer and other small files beside weights, which are copied as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from quantine.errors import CheckpointError, cut
from quantine.formats.directory import COPIED
from quantine.formats.shards import write_atomically

TOKENIZER: Final = "tokenizer.json"
"""The file of the library tokenizers."""
VOCABULARIES: Final = (TOKENIZER, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Files of which a directory with a tokenizer has one."""


def has_tokenizer(directory: Path) -> bool:
    """Whether ``directory`` has a vocabulary that transformers would look for."""
    return any((directory / name).is_file() for name in VOCABULARIES)


def check_small_files(directory: Path) -> None:
    """Refuse small files that nothing could read where they are copied to.

    Raises:
        CheckpointError: one is no JSON, or no tokenizer; the message names it.
    """
    for name in COPIED:
        path = directory / name
        if path.suffix == ".json" and path.is_file():
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise _damaged(path, error) from error
    if (directory / TOKENIZER).is_file():
        _check_tokenizer(directory / TOKENIZER)


def _check_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path)).encode("a")  # damage may show only in use
    except MemoryError:
        raise
    except Exception as error:  # the library raises bare exceptions
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read ({cut(error)}): download it again, or remove it to go on without"
    )


def copy_small_files(directory: Path, out: Path) -> None:
    """Copy what `COPIED` names from ``directory`` to ``out``, where it is there."""
    for name in COPIED:
        if (directory / name).is_file():
            write_atomically(out / name, (directory / name).read_bytes())
