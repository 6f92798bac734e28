"""Scores read alike wherever they are written."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from quantine.comparison.table import markdown
from quantine.eval.score_text import (
    IN_FULL,
    beginnings,
    measured_on,
    task_cells,
    text_cells,
    with_range,
)
from quantine.report.tables.scores import print_scores

CLOSE = {
    "kl": 0.0123456,
    "kl_stderr": 0.0002345,
    "top1": 0.91234,
    "top1_stderr": 0.00346,
    "reference_perplexity": 9.87654,
    "recovery": 0.98765,
    "recovery_low": 0.98123,
    "recovery_high": 0.99345,
}
TEXT = {
    "perplexity": 10.00012,
    "stderr": 0.12345,
    "tokens": 24552,
    "windows": 24,
    "window": 1024,
    "seconds": 1.25,
    **CLOSE,
}
TASK = {
    "metric": "acc",
    "score": 0.71234,
    "stderr": 0.0123456,
    "questions": 1838,
    "fewshot": 5,
    "reference_score": 0.73456,
    **{key: CLOSE[key] for key in ("recovery", "recovery_low", "recovery_high")},
}


def test_numbers_have_their_errors_and_intervals() -> None:
    cells = text_cells(TEXT)
    assert (cells.perplexity, cells.plain_perplexity) == ("10.000 ± 0.123", "10.000")
    assert (cells.recovery, cells.plain_recovery) == ("98.8% (98.1% to 99.3%)", "98.8%")
    assert (cells.divergence, cells.plain_divergence) == ("0.0123 ± 0.0002", "0.0123")
    assert (cells.agreement, cells.plain_agreement) == ("91.2% ± 0.3%", "91.2%")
    assert cells.reference == "9.877"
    asked = task_cells(TASK)
    assert (asked.score, asked.reference) == ("71.2% ± 1.2%", "73.5%")
    full = text_cells(TEXT, IN_FULL)
    assert (full.divergence, full.agreement) == ("0.01235 ± 0.00023", "91.23% ± 0.35%")


@pytest.mark.parametrize(
    ("metric", "score", "shown"),
    [
        ("word_perplexity", 21.00834, "21.008"),
        ("bits_per_byte", 0.81234, "0.812"),
        ("bleu", 31.25, "31.250"),
        ("exact_match", 1.0, "100.0%"),
    ],
)
def test_scores_of_tasks_that_are_no_shares_are_no_percentages(
    metric: str, score: float, shown: str
) -> None:
    task = {**TASK, "metric": metric, "score": score, "stderr": None, "reference_score": score}
    cells = task_cells(task)
    assert (cells.score, cells.reference) == (shown, shown)


@pytest.mark.parametrize("missing", [{}, {"perplexity": None, "stderr": None}])
def test_what_was_not_measured_is_empty(missing: dict[str, Any]) -> None:
    cells = text_cells({**TEXT, **dict.fromkeys(CLOSE), **missing})
    closeness = cells.reference, cells.recovery, cells.divergence, cells.agreement
    assert set(closeness) == {""}
    assert cells.perplexity == ("" if missing else "10.000 ± 0.123")
    task = {**TASK, "reference_score": None, "recovery": None, "stderr": None}
    asked = task_cells(task)
    assert (asked.score, asked.reference, asked.recovery) == ("71.2%", "", "")


def test_an_interval_may_be_missing() -> None:
    text = {**TEXT, "recovery_low": None, "recovery_high": None}
    assert text_cells(text).recovery == "98.8%"


def test_notes_say_what_was_asked() -> None:
    noted = "a.txt: 24 windows of 1024 tokens; piqa: 1,838 questions, 5 examples each"
    both = {"texts": {"a.txt": TEXT}, "tasks": {"piqa": TASK}}
    assert measured_on(both) == noted
    assert measured_on({**both, "texts": {}}) == noted.partition("; ")[2]


def test_notes_say_how_windows_and_questions_began() -> None:
    both = {"texts": {"a.txt": TEXT}, "tasks": {"piqa": TASK}}
    assert beginnings({**both, "bos": "none"}) == beginnings(both) == ""
    each, first = ({**both, "bos": bos} for bos in ("each", "first"))
    assert beginnings(each) == "every window begins with BOS, every question begins with BOS"
    assert beginnings({**first, "tasks": {}}) == "only the first window of a text begins with BOS"
    assert beginnings({**first, "texts": {}}) == "no question begins with BOS"
    assert measured_on(each) == f"{measured_on(both)}; {beginnings(each)}"


def test_a_range_follows_its_unit() -> None:
    speed = {"median": 12.34, "low": 11.0, "high": 13.0}
    assert with_range(speed) == "12.3 (11.0-13.0)"
    assert with_range(speed, "GB/s") == "12.3 GB/s (11.0-13.0)"


def test_tables_have_these_cells() -> None:
    console = Console(file=io.StringIO(), width=200)
    scores = {"reference": "demo", "texts": {"a": TEXT}, "tasks": {"piqa": TASK}}
    print_scores({**scores, "bits_per_weight": 3.5, "model_bytes": 10**6}, console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    full, asked = text_cells(TEXT, IN_FULL), task_cells(TASK, IN_FULL)
    numbers = [full.perplexity, full.recovery, full.divergence, full.agreement]
    assert all(cell in shown for cell in (*numbers, asked.score, asked.recovery))
    row = {
        "name": "a",
        "plan": {},
        "bits_per_weight": 3.5,
        "model_bytes": 10**6,
        "texts": {"a": TEXT},
        "tasks": {"piqa": TASK},
        "seconds": 1.0,
        "tokens_per_second": {"median": 1.0, "low": 1.0, "high": 1.0},
        "peak_memory_bytes": 1,
    }
    cells = text_cells(TEXT)
    table = markdown([row])
    assert f"| {cells.perplexity} | {cells.recovery} | {cells.plain_divergence} |" in table
