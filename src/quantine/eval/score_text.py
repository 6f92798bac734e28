"""Scores as text, written the same way in tables, model cards, pages and comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Precision:
    """Format specifications of the numbers of a score.

    Attributes:
        perplexity: format of a perplexity, or of a task's score that is no share, and its standard
            error.
        divergence: format of a mean KL divergence in nats per token, and its standard error.
        share: format of a task's score that is a share, of an agreement, and of their standard
            errors.
    """

    perplexity: str
    divergence: str
    share: str


IN_FULL: Final = Precision(".3f", ".5f", ".2%")
"""Formats on the terminal after a measurement, with digits enough to tell apart models that lose
next to nothing."""
IN_TABLES: Final = Precision(".3f", ".4f", ".1%")
"""Formats in model cards, pages and comparisons."""
IN_SHORT: Final = Precision(".2f", ".4f", ".1%")
"""Formats of a number that stands alone in large type."""
RECOVERY: Final = ".1%"
"""Format specification of a recovery and its interval, everywhere."""
JUDGED: Final = ".2%"
"""Format specification of a number that is compared with a required minimum, and of that."""
NO_SHARES: Final = ("perplexity", "bits_per_byte")
"""Parts of the names of lm-eval's metrics that are no shares, even where they are below 1."""
WINDOWS_BEGIN: Final = {
    "each": "every window begins with BOS",
    "first": "only the first window of a text begins with BOS",
}
"""Clauses on the windows of texts, by the ``bos`` of a measurement."""
QUESTIONS_BEGIN: Final = {
    "each": "every question begins with BOS",
    "first": "no question begins with BOS",
}
"""Clauses on the questions of tasks, by the ``bos`` of a measurement."""


@dataclass(frozen=True)
class TextCells:
    """The measurements of one text, as cells of a table; empty where there is no number.

    Attributes:
        tokens: number of scored tokens.
        windows: number of windows, and their length in tokens.
        perplexity: perplexity with its standard error.
        plain_perplexity: perplexity alone.
        reference: perplexity of the float model.
        recovery: recovery with its 95% interval.
        plain_recovery: recovery alone.
        divergence: mean KL divergence from the float model, with its standard error.
        plain_divergence: mean KL divergence alone.
        agreement: share of equal most likely tokens, with its standard error.
        plain_agreement: share of equal most likely tokens alone.
    """

    tokens: str
    windows: str
    perplexity: str
    plain_perplexity: str
    reference: str
    recovery: str
    plain_recovery: str
    divergence: str
    plain_divergence: str
    agreement: str
    plain_agreement: str


@dataclass(frozen=True)
class TaskCells:
    """The measurements of one task, as cells of a table; empty where there is no number.

    Attributes:
        questions: number of questions, and of examples before each.
        metric: name of the metric that the score is.
        score: score with its standard error.
        reference: score of the float model.
        recovery: recovery with its 95% interval.
    """

    questions: str
    metric: str
    score: str
    reference: str
    recovery: str


def text_cells(text: Mapping[str, Any], precision: Precision = IN_TABLES) -> TextCells:
    """The cells of one of the ``texts`` of `quantine.eval.evaluate.evaluate`."""
    return TextCells(
        tokens=f"{text['tokens']:,} tokens",
        windows=f"{text['windows']} windows of {text['window']}",
        perplexity=with_error(text["perplexity"], text["stderr"], precision.perplexity),
        plain_perplexity=number(text["perplexity"], precision.perplexity),
        reference=number(text["reference_perplexity"], precision.perplexity),
        recovery=_recovery(text),
        plain_recovery=number(text["recovery"], RECOVERY),
        divergence=with_error(text["kl"], text["kl_stderr"], precision.divergence),
        plain_divergence=number(text["kl"], precision.divergence),
        agreement=with_error(text["top1"], text["top1_stderr"], precision.share),
        plain_agreement=number(text["top1"], precision.share),
    )


def task_cells(task: Mapping[str, Any], precision: Precision = IN_TABLES) -> TaskCells:
    """The cells of one of the ``tasks`` of `quantine.eval.evaluate.evaluate`."""
    form = precision.share if _is_share(task) else precision.perplexity
    return TaskCells(
        questions=f"{task['questions']:,} questions, {task['fewshot']} examples each",
        metric=task["metric"],
        score=with_error(task["score"], task["stderr"], form),
        reference=number(task["reference_score"], form),
        recovery=_recovery(task),
    )


def _is_share(task: Mapping[str, Any]) -> bool:
    """Whether a task's score is a share of something, and not such as a perplexity."""
    scores = [score for score in (task["score"], task["reference_score"]) if score is not None]
    named_otherwise = any(word in task["metric"] for word in NO_SHARES)
    return not named_otherwise and all(0 <= score <= 1 for score in scores)


def measured_on(measured: Mapping[str, Any]) -> str:
    """The windows of every text and the questions of every task, for a note below a table.

    Args:
        measured: a result of `quantine.eval.evaluate.evaluate`, or a row of a comparison. It lacks
            ``bos`` if an earlier version made it; then nothing is said of that.
    """
    texts, tasks = measured["texts"], measured["tasks"]
    notes = [f"{name}: {text_cells(text).windows} tokens" for name, text in texts.items()]
    notes += [f"{name}: {task_cells(task).questions}" for name, task in tasks.items()]
    begins = beginnings(measured)
    return "; ".join([*notes, begins] if begins else notes)


def beginnings(measured: Mapping[str, Any]) -> str:
    """Which windows and questions began with BOS, as a clause; empty if the tokenizer has none."""
    bos = measured.get("bos", "none")
    if bos == "none":
        return ""
    clauses = [WINDOWS_BEGIN[bos]] if measured["texts"] else []
    clauses += [QUESTIONS_BEGIN[bos]] if measured["tasks"] else []
    return ", ".join(clauses)


def number(value: float | None, form: str) -> str:
    """``value`` in the format ``form``, such as ``".2f"``; empty for ``None``."""
    return "" if value is None else f"{value:{form}}"


def with_error(value: float | None, error: float | None, form: str) -> str:
    """``value`` and its standard error, each left out where it is ``None``."""
    return number(value, form) + ("" if error is None else f" ± {error:{form}}")


def with_interval(value: float, low: float | None, high: float | None, form: str) -> str:
    """``value`` and its confidence interval, which is left out where it is ``None``."""
    return f"{value:{form}}" + ("" if low is None else f" ({low:{form}} to {high:{form}})")


def with_range(measured: Mapping[str, float], unit: str = "") -> str:
    """The ``median`` of repeated measurements, the ``unit``, and their ``low`` and ``high``."""
    median = f"{measured['median']:.1f}" + (f" {unit}" if unit else "")
    return f"{median} ({measured['low']:.1f}-{measured['high']:.1f})"


def _recovery(measured: Mapping[str, Any]) -> str:
    if measured["recovery"] is None:
        return ""
    bounds = measured["recovery_low"], measured["recovery_high"]
    return with_interval(measured["recovery"], *bounds, RECOVERY)
