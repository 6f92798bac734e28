"""Where text comes from: local files, hub data sets, or the standard library."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final, Literal

from quantine.errors import CalibrationError

Split = Literal["calibration", "heldout"]

BUILTIN: Final = "builtin"
HELDOUT_EVERY: Final = 4
"""One topic of the built-in text in four is held out for evaluation."""

HUB_TEXTS: Final[dict[str, tuple[str, str | None, str, dict[Split, str], int | None]]] = {
    # name: (data set[@revision], configuration, column, split of each use, documents; None = all)
    # The hub's own parquet copy of ptb is read: its main branch is a script, which never runs here.
    "wikitext2": (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "text",
        {"calibration": "train", "heldout": "test"},
        None,
    ),
    "ptb": (
        "ptb-text-only/ptb_text_only@refs/convert/parquet",
        None,
        "sentence",
        {"calibration": "train", "heldout": "test"},
        None,
    ),
    "c4": (
        "allenai/c4",
        "en",
        "text",
        {"calibration": "train", "heldout": "validation"},
        2000,
    ),
    "pile-val": (
        "mit-han-lab/pile-val-backup",
        None,
        "text",
        {"calibration": "validation", "heldout": "validation"},
        2000,
    ),
}


def read_text(source: str, split: Split) -> str:
    """The text called ``source``.

    Args:
        source: ``builtin``, a name in `HUB_TEXTS`, or the path of a ``.txt``, ``.jsonl`` or
            ``.parquet`` file. A ``.txt`` file is read verbatim; the others by their ``text``
            field, rows joined with blank lines.
        split: which part of a text that has parts; files have none.

    Raises:
        CalibrationError: no such text, or it is empty or unreadable.
    """
    if source == BUILTIN:
        text = _builtin(split)
    elif source in HUB_TEXTS:
        text = _from_hub(source, split)
    else:
        text = _from_file(Path(source))
    if not text.strip():
        raise CalibrationError(f"the text {source!r} is empty")
    return text


def _builtin(split: Split) -> str:
    from pydoc_data.topics import topics

    # A topic's part depends on its name alone, so that other Python versions keep the split.
    def heldout(name: str) -> bool:
        return hashlib.sha256(name.encode()).digest()[0] % HELDOUT_EVERY == 0

    def joined(part: bool) -> str:
        return "\n\n".join(topics[n].strip() for n in sorted(topics) if heldout(n) == part)

    if split == "calibration":
        return joined(False)
    # Topics quote each other, up to indentation: what calibration has seen is not held out.
    seen = {" ".join(paragraph.split()) for paragraph in joined(False).split("\n\n")}
    return "\n\n".join(p for p in joined(True).split("\n\n") if " ".join(p.split()) not in seen)


def _from_file(path: Path) -> str:
    if not path.is_file():
        raise CalibrationError(
            f"no text file {path} (known names: {', '.join([BUILTIN, *HUB_TEXTS])})"
        )
    try:
        if path.suffix == ".parquet":
            return "\n\n".join(_parquet_rows(path))
        text = path.read_bytes().decode("utf-8")  # verbatim: no line end is translated
        if path.suffix == ".jsonl":
            lines = text.split("\n")
            return "\n\n".join(json.loads(line)["text"] for line in lines if line.strip())
        return text
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(
            f"{path} cannot be read as {path.suffix or 'text'}: {error!r}; .jsonl and .parquet "
            "need a `text` field of strings, files must be UTF-8"
        ) from error


def _parquet_rows(path: Path) -> list[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise CalibrationError(f"{path} needs pyarrow: pip install 'quantine[hub]'") from error
    try:
        return [row for row in read_table(path, columns=["text"])["text"].to_pylist() if row]
    except (ArrowException, OSError) as error:
        raise ValueError(str(error)) from error


def _from_hub(name: str, split: Split) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"the text {name!r} comes from the hub and needs datasets: "
            "pip install 'quantine[hub]', or give a local file"
        ) from error
    data_set, configuration, column, splits, limit = HUB_TEXTS[name]
    try:
        path, _, revision = data_set.partition("@")
        rows = load_dataset(
            path,
            configuration,
            split=splits[split],
            streaming=limit is not None,
            revision=revision or None,
        )
        texts = [row[column] for _, row in zip(range(limit or len(rows)), rows, strict=False)]
    except Exception as error:  # the library raises many types; none of them names a remedy
        raise CalibrationError(
            f"{data_set} cannot be read from the hub ({error}): check the connection, or give a "
            "local file"
        ) from error
    # Rows of wikitext keep their newline and its blank rows are empty: this is how GPTQ joined it.
    return "\n\n".join(texts)
