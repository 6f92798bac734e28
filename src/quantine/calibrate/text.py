"""Texts for calibration and evaluation: local files, hub data sets, or the standard library's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

from quantine.calibrate.text_files import TextFile, read_file, text_file
from quantine.errors import CalibrationError, cut, ending

Split = Literal["calibration", "heldout"]
"""The part of a text: ``"calibration"``, or ``"heldout"`` for evaluation."""

BUILTIN: Final = "builtin"
"""Name of the text that needs no file: the help topics of Python's standard library."""
HELDOUT_EVERY: Final = 4
"""Number of topics of the built-in text of which one, on average, is held out for evaluation."""


@dataclass(frozen=True)
class HubPart:
    """The rows of a hub data set that make up one text.

    Attributes:
        split: name of the data set's split.
        separator: string put between two rows.
        rows: number of rows taken; ``None`` takes all.
        first: number of rows before them.
    """

    split: str
    separator: str = "\n\n"
    rows: int | None = None
    first: int = 0


@dataclass(frozen=True)
class HubText:
    """A text on the hub, and which rows of it are for calibration and which are held out.

    Attributes:
        data_set: the data set's id on the hub.
        column: name of the column that holds the text.
        calibration: the rows for calibration.
        heldout: the rows for evaluation.
        configuration: name of the data set's configuration, where it has several.
        revision: name of a branch other than the main one.
    """

    data_set: str
    column: str
    calibration: HubPart
    heldout: HubPart
    configuration: str | None = None
    revision: str | None = None

    def part(self, split: Split) -> HubPart:
        """The rows for calibration or evaluation."""
        return self.calibration if split == "calibration" else self.heldout


HUB_TEXTS: Final[dict[str, HubText]] = {
    # The held-out parts are those of the tables in GPTQ's and SpQR's papers: WikiText-2's raw test
    # set, whose rows keep their newline; Penn Treebank's test set in one line; the first 1100
    # validation documents of C4, which fill the 256 windows of 2048 tokens that are scored there.
    "wikitext2": HubText(
        "Salesforce/wikitext",
        "text",
        HubPart("train"),
        HubPart("test"),
        configuration="wikitext-2-raw-v1",
    ),
    # The hub's own parquet copy of ptb is read: its main branch is a script, which never runs here.
    "ptb": HubText(
        "ptb-text-only/ptb_text_only",
        "sentence",
        HubPart("train", " "),
        HubPart("test", " "),
        revision="refs/convert/parquet",
    ),
    # What RPTQ's tables call ptb.
    "ptb-validation": HubText(
        "ptb-text-only/ptb_text_only",
        "sentence",
        HubPart("train"),
        HubPart("validation"),
        revision="refs/convert/parquet",
    ),
    "c4": HubText(
        "allenai/c4",
        "text",
        HubPart("train", rows=2000),
        HubPart("validation", " ", 1100),
        configuration="en",
    ),
    # Which has one split: what is held out is the rows after those for calibration.
    "pile-val": HubText(
        "mit-han-lab/pile-val-backup",
        "text",
        HubPart("validation", rows=2000),
        HubPart("validation", rows=2000, first=2000),
    ),
}
"""Texts on the hub by the names that plans and commands know them by."""


def read_text(source: str, split: Split, tokenizer: Any = None) -> str:
    """Read a text by its name or path.

    Args:
        source: ``builtin``, a name in `HUB_TEXTS`, or the path of a file of one of the kinds in
            `quantine.calibrate.text_files.KINDS`, perhaps compressed, and perhaps followed by a
            colon and the name of the field that holds the text.
        split: the part wanted of a built-in or hub text; a file is read whole.
        tokenizer: the model's tokenizer of transformers, which only conversations need.

    Raises:
        CalibrationError: there is no such text, it is empty or cannot be read, or a package to read
            it with is missing.
    """
    if source == BUILTIN:
        text = _builtin(split)
    elif source in HUB_TEXTS:
        text = _from_hub(source, split)
    else:
        text = read_file(_file(source), tokenizer)
    if not text.strip():
        raise CalibrationError(f"the text {ending(source)!r} is empty: give one with words in it")
    return text


def text_name(source: str) -> str:
    """What results call the text ``source``: a file's name without its directory."""
    file = text_file(source)
    return Path(source).name if file is None else file.name


def _file(source: str) -> TextFile:
    file = text_file(source)
    if file is None:
        raise CalibrationError(
            f"no text file {ending(source)} (known names: {', '.join([BUILTIN, *HUB_TEXTS])})"
        )
    return file


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


def _from_hub(name: str, split: Split) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"the text {name!r} comes from the hub and needs datasets: "
            "pip install 'quantine[hub]', or give a local file"
        ) from error
    text = HUB_TEXTS[name]
    part = text.part(split)
    try:
        rows = load_dataset(
            text.data_set,
            text.configuration,
            split=part.split,
            streaming=part.rows is not None,
            revision=text.revision,
        )
        end = None if part.rows is None else part.first + part.rows
        return part.separator.join(row[text.column] for row in islice(rows, part.first, end))
    except MemoryError:
        raise
    except Exception as error:  # the library raises many types; none of them names a remedy
        raise CalibrationError(
            f"{text.data_set} cannot be read from the hub ({cut(error)}): check the connection, "
            "or give a local file"
        ) from error
