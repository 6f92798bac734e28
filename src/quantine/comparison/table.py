"""The table of a comparison as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantine.eval.comparison_row import COMPARISON_STEM, Row, loss_of_quality
from quantine.eval.score_text import measured_on, number, task_cells, text_cells, with_range
from quantine.formats.directory import encoded, writing
from quantine.formats.shards import write_atomically


def write_tables(rows: Sequence[Row], out: Path) -> list[Path]:
    """Write ``OUT/comparison.md``, ``.csv`` and ``.json``, and return their paths.

    Raises:
        OutputError: they cannot be written.
    """
    files = {"md": markdown(rows), "csv": as_csv(rows), "json": as_json(rows)}
    with writing(out):
        for suffix, text in files.items():
            write_atomically(out / f"{COMPARISON_STEM}.{suffix}", encoded(text))
    return [out / f"{COMPARISON_STEM}.{suffix}" for suffix in files]


def pareto_front(rows: Sequence[Row]) -> list[str]:
    """Names of the quantized rows that no other beats in both size and perplexity.

    Perplexity is the geometric mean over texts of its ratio to the float model's.
    """
    points = {
        row["name"]: (row["bits_per_weight"], ratio)
        for row in rows
        if row["plan"] is not None and (ratio := loss_of_quality(row)) is not None
    }
    return [
        name
        for name, (bits, ratio) in points.items()
        if not any(b <= bits and r <= ratio and (b, r) != (bits, ratio) for b, r in points.values())
    ]


def flat(row: Row) -> dict[str, Any]:
    """Every number of a row under a name of its own, for a line of the CSV."""
    found = {key: row[key] for key in ("name", "bits_per_weight", "model_bytes", "outlier_share")}
    for name, text in row["texts"].items():
        for key in ("perplexity", "stderr", "recovery", "recovery_low", "recovery_high", "kl"):
            found[f"{name} {key}"] = text[key]
        found[f"{name} top1"] = text["top1"]
    for name, task in row["tasks"].items():
        for key in ("score", "stderr", "recovery", "recovery_low", "recovery_high"):
            found[f"{name} {key}"] = task[key]
    found |= {f"tokens/s {key}": value for key, value in row["tokens_per_second"].items()}
    return found | {key: row[key] for key in ("seconds", "peak_memory_bytes")}


def as_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV, with every number; a cell is empty where there is none."""
    lines = [flat(row) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def as_json(rows: Sequence[Row]) -> str:
    """The rows and the names of the best as JSON, with null for numbers that JSON lacks."""
    finite = json.loads(json.dumps(list(rows)), parse_constant=lambda _: None)
    return json.dumps({"rows": finite, "pareto": pareto_front(rows)}, indent=2) + "\n"


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table for people, from small to large, with a note below."""
    texts, tasks = list(rows[0]["texts"]), list(rows[0]["tasks"])
    heads = ["plan", "bits per weight", "MB"]
    heads += [f"{name} {kind}" for name in texts for kind in ("perplexity", "recovery", "KL")]
    heads += [f"{name} ({rows[0]['tasks'][name]['metric']})" for name in tasks]
    heads += ["tokens/s", "seconds", "peak GB"]
    front = pareto_front(rows)
    lines = [_line(heads), "|" + "---|" * len(heads)]
    lines += [
        _line(_cells(row, row["name"] in front, texts, tasks))
        for row in sorted(rows, key=lambda row: float(row["bits_per_weight"]))
    ]
    return "\n".join(lines) + "\n" + _notes(rows[0])


def _cells(row: Row, on_front: bool, texts: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """The cells of a row; texts and tasks are in the order of the heads, which rows may lack."""
    cells = [f"**{row['name']}**" if on_front else row["name"]]
    cells += [f"{row['bits_per_weight']:.3f}", f"{row['model_bytes'] / 1e6:.1f}"]
    for text in (text_cells(row["texts"][name]) for name in texts):
        cells += [text.perplexity, text.recovery, text.plain_divergence]
    cells += [task_cells(row["tasks"][name]).score for name in tasks]
    cells.append(with_range(row["tokens_per_second"]))
    cells.append(number(row["seconds"], ".0f"))
    peak = row["peak_memory_bytes"]
    return [*cells, "" if peak is None else f"{peak / 1e9:.2f}"]


def _line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def _notes(row: Row) -> str:
    """The note below the table: what was measured, and what its columns mean."""
    return (
        f"\n{measured_on(row)}. ± is one standard error; recovery is the "
        "float model's perplexity over the row's, with its 95% interval. Bold: no other row is "
        "both smaller and better. Bits are counted from the files, over quantized weights; for "
        "`float`, over all. Seconds and peak memory are those of quantizing.\n"
    )
