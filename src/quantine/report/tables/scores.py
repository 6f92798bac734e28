"""The tables of a model's scores on texts and tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from quantine.eval.score_text import IN_FULL, beginnings, number, task_cells, text_cells
from quantine.report.byte_text import megabytes
from quantine.report.tables.console import new_table


def window_line(text: str, done: int, count: int, perplexity: float) -> str:
    """A line on how far the evaluation of the text ``text`` is, and its perplexity until now."""
    so_far = number(perplexity, IN_FULL.perplexity)
    return f"{text}: window {done}/{count}  perplexity so far {so_far}"


def print_scores(scores: Mapping[str, Any], console: Console) -> None:
    """Print what `quantine.eval.evaluate.evaluate` returned."""
    compared = scores["reference"] is not None
    console.print(_text_table(scores["texts"], compared))
    if scores["tasks"]:
        console.print(_task_table(scores["tasks"], compared))
    console.print(
        f"{scores['bits_per_weight']:.3f} bits per weight, weight files "
        f"{megabytes(scores['model_bytes'])}"
        + (f"; compared with {scores['reference']}" if compared else "")
        + (f"; {begins}" if (begins := beginnings(scores)) else "")
    )


def _text_table(texts: Mapping[str, Any], compared: bool) -> Table:
    closeness = ["reference", "recovery (95%)", "KL, nats per token", "top-1 agreement"]
    heads = ["text", "scored", "perplexity", *(closeness if compared else []), "seconds"]
    table = new_table(*heads)
    for name, text in texts.items():
        cells = text_cells(text, IN_FULL)
        row = [name, f"{cells.tokens}, {cells.windows}", cells.perplexity]
        if compared:
            row += [cells.reference, cells.recovery, cells.divergence, cells.agreement]
        table.add_row(*row, f"{text['seconds']:.1f}")
    return table


def _task_table(tasks: Mapping[str, Any], compared: bool) -> Table:
    heads = ["task", "asked", "score", *(["reference", "recovery (95%)"] if compared else [])]
    table = new_table(*heads)
    for name, task in tasks.items():
        cells = task_cells(task, IN_FULL)
        row = [name, cells.questions, f"{cells.metric} {cells.score}"]
        table.add_row(*row, *([cells.reference, cells.recovery] if compared else []))
    return table
