"""The scores of a quantized directory, kept in it for its model card and its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from quantine.core.versions import computing_versions
from quantine.errors import FormatError
from quantine.eval.score_text import measured_on, task_cells, text_cells
from quantine.formats.directory import (
    REPORT,
    SCORES,
    encoded,
    is_finished,
    read_json,
    write_json,
    writing,
)
from quantine.formats.shards import write_atomically
from quantine.run.card import model_card

CARD: Final = "README.md"
"""Name of the model card in a quantized directory."""


def check_recordable(directory: Path) -> None:
    """Refuse a directory that cannot keep scores, before they are measured.

    Raises:
        FormatError: quantine did not write it, or it is unfinished.
    """
    if not is_finished(directory):
        raise FormatError(
            f"{directory} is no finished directory of quantine: it has no {REPORT} for scores to "
            "belong to"
        )


def record(
    directory: Path,
    scores: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    digests: Mapping[str, str],
) -> None:
    """Keep ``scores`` in ``directory`` and write them into its model card.

    Args:
        scores: of `quantine.eval.evaluate.evaluate`, with numbers that JSON has.
        samples: of `quantine.eval.samples.decode_samples`.
        digests: hashes of the files that were measured.

    Raises:
        FormatError: quantine did not write the directory.
        OutputError: it cannot be written.
    """
    check_recordable(directory)
    kept = {
        **scores,
        "samples": list(samples),
        "files": dict(digests),
        "versions": computing_versions(),
    }
    with writing(directory):
        write_json(directory / SCORES, kept)
    write_card(directory)


def recorded(directory: Path) -> dict[str, Any] | None:
    """The scores that `record` kept in ``directory``; ``None`` if there are none."""
    path = directory / SCORES
    return dict(read_json(path)) if path.is_file() else None


def write_card(directory: Path) -> None:
    """Write the model card of ``directory``, with the scores that are recorded there.

    Raises:
        OutputError: its report or its scores are damaged, or it cannot be written.
    """
    scores = recorded(directory)
    quality = "" if scores is None else quality_section(scores)
    card = model_card(read_json(directory / REPORT), quality)
    with writing(directory):
        write_atomically(directory / CARD, encoded(card))


def quality_section(scores: dict[str, Any]) -> str:
    """The model card's section about what was measured, in Markdown."""
    compared = scores["reference"] is not None
    heads = ["", "this model", *(["float model", "recovery"] if compared else [])]
    lines = [_row(heads), "|" + "---|" * len(heads)]
    for name, text in scores["texts"].items():
        cells = text_cells(text)
        closeness = [cells.reference, cells.recovery] if compared else []
        lines.append(_row([f"perplexity on {name}", cells.perplexity, *closeness]))
    for name, task in scores["tasks"].items():
        asked = task_cells(task)
        closeness = [asked.reference, asked.recovery] if compared else []
        lines.append(_row([f"{name} ({asked.metric})", asked.score, *closeness]))
    meaning = (
        "Recovery is the float model's perplexity over this model's, or this model's score over "
        "the float model's, with its 95% interval. " * compared
    )
    return f"""
## Quality

{chr(10).join(lines)}

{measured_on(scores)}. ± is one standard error. {meaning}
"""


def _row(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
