"""Task scores by lm-eval, which brings prompts and metrics; nothing of it is copied here."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from quantine.errors import PlanError, QuantineError
from quantine.eval.code import passes
from quantine.eval.interval import mean_with_error, score_recovery

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEWSHOT: Final[dict[str, int]] = {
    # SpQR's tasks, without examples.
    "winogrande": 0,
    "piqa": 0,
    "hellaswag": 0,
    "arc_easy": 0,
    "arc_challenge": 0,
    # RPTQ has these, too.
    "lambada_openai": 0,
    "openbookqa": 0,
    "boolq": 0,
    # AdaDim's.
    "mmlu": 5,
    "humaneval": 0,
    # Its paper prompts a model tuned for mathematics without examples; this is lm-eval's own count.
    "gsm8k": 5,
}
"""Examples in the prompt, as the papers have them; other tasks say it in their definitions."""
BATCH: Final = 8
"""Sequences that go through the model together; sums of floats depend on it."""
PASS_AT_1: Final = "pass@1"
PYTHON_SEED: Final = 0
OTHER_SEED: Final = 1234
FEWSHOT_SEED: Final = 1234
"""Seeds of everything random in a task, such as which examples go into a prompt: lm-eval's."""


@dataclass(frozen=True)
class TaskRequest:
    """Tasks to run.

    Attributes:
        names: of lm-eval's tasks or groups, or of those defined in ``path``.
        limit: questions of each task at most, the first ones; ``None`` asks all.
        path: directory with further task definitions.
        run_code: allow tasks that run programs which the model wrote.
    """

    names: tuple[str, ...]
    limit: int | None = None
    path: Path | None = None
    run_code: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise PlanError(f"the task limit must be at least 1 question, not {self.limit}")
        if self.path is not None and not self.path.is_dir():
            raise PlanError(f"{self.path} is no directory of task definitions")

    def identity(self) -> str:
        """Hash of all that decides the questions and how they are scored."""
        state: list[Any] = [self.names, self.limit, BATCH, version("lm_eval")]
        files = [] if self.path is None else sorted(p for p in self.path.rglob("*") if p.is_file())
        state += [hashlib.blake2b(file.read_bytes()).hexdigest() for file in files]
        return hashlib.blake2b(json.dumps(state).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class TaskScore:
    """The score of a task or of a group of tasks.

    Attributes:
        metric: that of the task's definition which comes first, of those where more is better.
        score: its mean over questions.
        stderr: standard error of the mean over questions, those of a group taken together.
        fewshot: examples in a prompt.
        answers: score of each question, in order; empty where the metric is no mean over them.
        metrics: all of the task's metrics.
    """

    metric: str
    score: float
    stderr: float | None
    fewshot: int
    answers: tuple[float, ...]
    metrics: dict[str, float]


class Tasks:
    """Tasks that exist and may be run.

    Raises:
        QuantineError: lm-eval is not installed.
        PlanError: no such task, its data is out of reach, or it runs code without leave to do so.
    """

    def __init__(self, request: TaskRequest) -> None:
        if find_spec("lm_eval") is None:
            raise QuantineError("tasks need lm-eval: pip install 'quantine[eval]'")
        self.request = request
        manager = _manager(request)
        with _seeded():
            self._loaded = {name: _load(name, manager) for name in request.names}
        self._unsafe = {name for name, found in self._loaded.items() if _runs_code(found)}
        if self._unsafe and not request.run_code:
            raise PlanError(
                f"{', '.join(sorted(self._unsafe))} runs programs that the model wrote: allow it "
                "with --run-code, on a machine that holds nothing dear"
            )

    def run(self, model: PreTrainedModel, tokenizer: Any) -> dict[str, TaskScore]:
        """Score ``model`` on every task, by name.

        Programs are not run by lm-eval, but by `quantine.eval.code`.

        Raises:
            PlanError: a task fails.
        """
        from lm_eval.models.huggingface import HFLM

        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
        scores = {}
        for name in self.request.names:
            with _seeded():
                scores[name] = self._run_one(name, wrapped)
        return scores

    def _run_one(self, name: str, wrapped: Any) -> TaskScore:
        from lm_eval.evaluator import evaluate

        unsafe = name in self._unsafe
        for task in self._loaded[name]["tasks"].values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            # What a definition says goes first.
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=FEWSHOT.get(name, 0))
            if unsafe:
                task.override_metric(metric_name="bypass")  # collect what the model writes
        try:
            results: Any = evaluate(
                wrapped,
                self._loaded[name],
                limit=self.request.limit,
                bootstrap_iters=0,  # errors of means need none
                confirm_run_unsafe_code=unsafe,
            )
        except Exception as error:  # definitions fail in many ways, none of them typed
            raise PlanError(f"task {name} cannot be run: {error!r}") from error
        return _score_of_code(name, results) if unsafe else _score_of(name, results)


def compare_tasks(
    scores: dict[str, TaskScore], reference: dict[str, TaskScore] | None
) -> dict[str, Any]:
    """The ``tasks`` of `quantine.eval.evaluate.evaluate`: plain values by name of the task."""
    found: dict[str, Any] = {}
    for name, score in scores.items():
        other = None if reference is None else reference[name]
        paired = bool(other and score.answers and len(score.answers) == len(other.answers))
        recovery = score_recovery(score.answers, other.answers) if other and paired else None
        found[name] = {
            "metric": score.metric,
            "score": score.score,
            "stderr": score.stderr,
            "fewshot": score.fewshot,
            "questions": len(score.answers),
            "metrics": score.metrics,
            "reference_score": None if other is None else other.score,
            "recovery": None if recovery is None else recovery.value,
            "recovery_low": None if recovery is None else recovery.low,
            "recovery_high": None if recovery is None else recovery.high,
        }
    return found


def _manager(request: TaskRequest) -> Any:
    """What finds the definitions: lm-eval's own thousands only where they are needed."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    place = None if request.path is None else str(request.path)
    missing: list[str] = []
    for defaults in (False, True):
        manager = TaskManager(include_path=place, include_defaults=defaults)
        missing = [name for name in request.names if name not in manager.all_tasks]
        if not missing:
            return manager
    raise PlanError(
        f"lm-eval has no task {', '.join(missing)}: `lm-eval ls tasks` lists them, and a task path "
        "adds others"
    )


def _load(name: str, manager: Any) -> Any:
    """The task or group ``name`` with its data."""
    try:
        return manager.load([name])
    except Exception as error:  # definitions and data sets fail in many ways, none of them typed
        raise PlanError(
            f"task {name} cannot be loaded ({error!r}): its data may need a connection to the hub; "
            "a task path can have a definition that reads local files"
        ) from error


def _runs_code(loaded: Any) -> bool:
    return any(bool(task.get_config("unsafe_code")) for task in loaded["tasks"].values())


def _score_of(name: str, results: Any) -> TaskScore:
    """What lm-eval's ``results`` say of one task or group."""
    leaves = _leaves(name, results)
    values = {**results["results"], **results.get("groups", {})}[name]
    named = {key: value for key, value in values.items() if "," in key and "_stderr" not in key}
    better = results["higher_is_better"]
    key = next(k for k in named if better.get(name, {}).get(k.split(",")[0]) is not False)
    metric, kind = key.split(",", 1)
    answers = _answers([results["samples"][leaf] for leaf in leaves], metric, kind)
    return TaskScore(
        metric,
        float(named[key]),
        mean_with_error(answers)[1] if answers else None,
        max(results["n-shot"].get(leaf, 0) for leaf in leaves),
        answers,
        {key.removesuffix(",none"): float(value) for key, value in named.items()},
    )


def _score_of_code(name: str, results: Any) -> TaskScore:
    """Run the programs that lm-eval let the model write."""
    answers = tuple(
        float(passes(f"{_first(sample['filtered_resps'])}\n{sample['target']}"))
        for leaf in _leaves(name, results)
        for sample in results["samples"][leaf]
    )
    score, stderr = mean_with_error(answers)
    return TaskScore(PASS_AT_1, score, stderr, 0, answers, {PASS_AT_1: score})


def _first(answers: Any) -> str:
    """The first answer; where several are drawn for each question, they are a list in a list."""
    return answers if isinstance(answers, str) else _first(answers[0])


def _leaves(name: str, results: Any) -> list[str]:
    """The tasks below a group, in the order of their names; a task itself."""
    below = results.get("group_subtasks", {}).get(name) or []
    found = [leaf for child in below for leaf in _leaves(child, results)]
    return sorted(found) if found else [name]


def _answers(samples: Sequence[Any], metric: str, kind: str) -> tuple[float, ...]:
    """The score of each question; none where it is not a number."""
    values = [
        sample.get(metric)
        for task in samples
        for sample in sorted(task, key=lambda sample: sample["doc_id"])
        if sample.get("filter", kind) == kind
    ]
    if not all(isinstance(value, int | float) for value in values):
        return ()
    return tuple(float(value) for value in values)


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed all generators as lm-eval does, and give them their states back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(PYTHON_SEED)
        np.random.seed(OTHER_SEED)
        torch.manual_seed(OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
