"""The tokenizer and other small files beside weights, which are copied as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from quantine.errors import CheckpointError, cut
from quantine.formats.directory import copied_files
from quantine.formats.shards import write_atomically

TOKENIZER: Final = "tokenizer.json"
"""The file of the library tokenizers."""
TOKENIZER_SETTINGS: Final = "tokenizer_config.json"
VOCABULARIES: Final = (
    TOKENIZER,
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "tekken.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
"""Files of which a directory with a tokenizer has one."""


def has_tokenizer(directory: Path) -> bool:
    """Whether ``directory`` has one of `VOCABULARIES`."""
    return any((directory / name).is_file() for name in VOCABULARIES)


def check_tokenizer(directory: Path) -> None:
    """Refuse a tokenizer that cannot be read; others than those of the library are not looked at.

    Raises:
        CheckpointError: a file of it is damaged; the message names it.
    """
    settings, vocabulary = directory / TOKENIZER_SETTINGS, directory / TOKENIZER
    if settings.is_file():
        try:
            json.loads(settings.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise _damaged(settings, error) from error
    if vocabulary.is_file():
        _load(vocabulary)


def _load(path: Path) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except MemoryError:
        raise
    except Exception as error:  # the library raises bare exceptions
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read ({cut(error)}): download it again, install a newer tokenizers, or "
        "remove it to go on without"
    )


def copy_small_files(directory: Path, out: Path) -> None:
    """Copy the `copied_files` of ``directory`` to ``out``."""
    for name, file in copied_files(directory).items():
        (out / name).parent.mkdir(exist_ok=True)
        write_atomically(out / name, file.read_bytes())
