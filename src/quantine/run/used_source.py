"""What a run has used of its source, which has to be the same when it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from quantine.errors import OutputError, ResumeMismatch
from quantine.formats.directory import RUN_DIRECTORY, read_json
from quantine.source.checkpoint import Checkpoint
from quantine.source.read_record import ReadRecord

SOURCE: Final = "source"
"""Name under which a run stores what it has read of its source, before it commits what it made."""


def recorded_source(out: Path) -> ReadRecord:
    """What the unfinished run in ``out`` has read of its source; nothing, if there is no run.

    Raises:
        OutputError: the record is damaged.
    """
    path = out / RUN_DIRECTORY / f"{SOURCE}.json"
    return ReadRecord(read_json(path) if path.is_file() else None)


def check_source(out: Path, checkpoint: Checkpoint) -> None:
    """Check that what the run in ``out`` has read of its source is still the same.

    Args:
        out: the output directory.
        checkpoint: the source, with what `recorded_source` gives.

    Raises:
        ResumeMismatch: it is not; the message names a tensor.
    """
    changed = checkpoint.changed()
    if changed is not None:
        raise ResumeMismatch(
            f"the run in {out} was started with another weights: {changed} is not what it read; "
            "give the model as it was, or use another output path"
        )


def check_record(out: Path, record: ReadRecord) -> None:
    """Check that ``record`` is still what `recorded_source` gives, now that ``out`` is locked.

    Raises:
        OutputError: another process has read more of the source since.
    """
    if set(recorded_source(out).names()) != set(record.names()):
        raise OutputError(f"another process has worked on {out} meanwhile: repeat the command")
