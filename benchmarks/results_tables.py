"""Rows, cells and JSON files that the parts of docs/results.md are made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent / "results"


def read(name: str) -> Any:
    """What benchmarks/results/NAME.json holds."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def head(cells: Sequence[str]) -> list[str]:
    """The two lines that begin a table in Markdown."""
    return [line(cells), "|---" * len(cells) + "|"]


def line(cells: Sequence[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def closeness(score: dict[str, Any]) -> list[str]:
    """Cells with the perplexity and the divergence of `quantine eval`, with standard errors."""
    return [
        f"{score['perplexity']:.3f} ± {score['stderr']:.2f}",
        f"{score['kl']:.4f} ± {score['kl_stderr']:.4f}",
    ]
