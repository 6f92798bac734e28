"""Damaged texts: they are read, and cut into segments by a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Final

import pyarrow
from pyarrow import parquet

from fuzz import values
from fuzz.campaign import Target
from quantine import Calibration
from quantine.calibrate.segments import calibration_segments
from tiny_models import VOCAB, byte_tokenizer

ROWS: Final = [{"text": f"Line {n}: {n * n % 97} apples and é {n}."} for n in range(40)]


def build_texts(root: Path) -> None:
    """The same rows in every kind of file."""
    (root / "texts").mkdir()
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, root / "texts" / "t.parquet")
    lines = "\n".join(json.dumps(row) for row in ROWS)
    for name, text in (
        ("t.txt", "\n".join(row["text"] for row in ROWS)),
        ("t.jsonl", lines),
        ("t.json", json.dumps(ROWS)),
    ):
        (root / "texts" / name).write_text(text, encoding="utf-8")


def attempt(random: Random, root: Path, place: Path) -> None:
    """Read a damaged text and cut segments from it."""
    source = random.choice(sorted((root / "texts").iterdir()))
    data = source.read_bytes()
    if source.suffix == ".json" and random.random() < 0.7:
        data = values.mutated_json(random, data)
    elif source.suffix == ".jsonl" and random.random() < 0.7:
        lines = data.split(b"\n")
        number = random.randrange(len(lines))
        lines[number] = values.mutated_json(random, lines[number])
        data = b"\n".join(lines)
    else:
        data = values.mutated_bytes(random, data)
    file = place.with_suffix(source.suffix)
    file.write_bytes(data)
    try:
        calibration_segments(Calibration(str(file), 2, 16), byte_tokenizer(), VOCAB, None)
    finally:
        file.unlink()


TEXTS: Final = Target("texts", 0.15, build_texts, attempt)
