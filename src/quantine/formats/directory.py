"""What the files of an output directory are called, and reading and writing its JSON."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from quantine.errors import OutputError, cut, ending
from quantine.formats.shards import write_atomically

RUN_DIRECTORY: Final = ".quantine"
"""The folder of an unfinished run, which the run removes last."""
REPORT: Final = "quantine_report.json"
"""The file that says what was done to each layer; a run writes it last."""
SCORES: Final = "quantine_scores.json"
"""What was measured of the weights beside it, where `quantine eval --record` kept it."""
PAGE: Final = "quantine_report.html"
"""The page that `quantine report` writes about all this."""
MAPS: Final = "quantine_maps.safetensors"
"""Sensitivity of weights and clusters of channels, for pictures; not a weight file."""
COPIED: Final = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Names of the source's files that are copied: they describe its tokenizer and generation
settings."""
MORE_TEMPLATES: Final = "additional_chat_templates/*.jinja"
"""Those that are copied, too: chat templates beside the usual one."""


def copied_files(directory: Path) -> dict[str, Path]:
    """The files of `COPIED` and `MORE_TEMPLATES` that ``directory`` has, by path inside of it."""
    files = [directory / name for name in COPIED] + sorted(directory.glob(MORE_TEMPLATES))
    return {file.relative_to(directory).as_posix(): file for file in files if file.is_file()}


def is_finished(out: Path) -> bool:
    """Whether ``out`` holds a completed run."""
    return (out / REPORT).is_file() and not (out / RUN_DIRECTORY).exists()


def read_json(path: Path) -> Any:
    """The content of a JSON file that quantine wrote.

    Raises:
        OutputError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{path} is damaged ({cut(error)}): delete the directory") from error


def encoded(text: str) -> bytes:
    r"""``text`` as UTF-8, with ``\udcXX`` for bytes of file names that are no UTF-8."""
    return text.encode(errors="backslashreplace")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context in which a failure of the system is one to write ``path``.

    Raises:
        OutputError: the system refuses something, as where the disk is full.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}: mend that, or choose another "
            "place"
        ) from error


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A context that fills the directory it gives, which becomes ``out`` if all goes well.

    Args:
        out: new, or an empty directory.

    Raises:
        OutputError: ``out`` is taken, or the system refuses to write.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise OutputError(f"{ending(out)} is there already: choose another output path")
    with writing(out):
        parent = out.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f".{out.name[:40]}-"))
        try:
            yield temporary
            temporary.chmod(0o755)
            temporary.replace(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as a JSON file that exists whole or not at all, also after a crash."""
    write_atomically(path, encoded(json.dumps(value, indent=2, ensure_ascii=False)) + b"\n")
