"""Task scores, such as zero-shot accuracy, by lm-eval, which brings prompts, data and metrics."""

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

from quantine.calibrate.bos import BOS_DEFAULT, Bos
from quantine.calibrate.token_stream import frame_of
from quantine.errors import PlanError, QuantineError, cut, is_out_of_memory
from quantine.eval.code import passes
from quantine.eval.interval import mean_with_error, score_recovery
from quantine.ranks.ranks import ALONE, Ranks

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
"""Number of examples in the prompt by task, as in the papers; other tasks define it themselves."""
BATCH: Final = 8
"""Number of sequences that go through the model together; how float sums round depends on it."""
PASS_AT_1: Final = "pass@1"
"""Name of the metric of tasks that run programs: the share that pass at the first attempt."""
PYTHON_SEED: Final = 0
"""Seed of Python's generator during a task, as lm-eval sets it."""
OTHER_SEED: Final = 1234
"""Seed of numpy's and PyTorch's generators during a task, as lm-eval sets it."""
FEWSHOT_SEED: Final = 1234
"""Seed that decides which examples go into a prompt, as lm-eval sets it."""


@dataclass(frozen=True)
class TaskRequest:
    """A request for task scores.

    Raises `PlanError` if ``limit`` is below 1 or ``path`` is no directory.

    Attributes:
        names: names of lm-eval's tasks or groups of tasks, or of those defined in ``path``.
        limit: largest number of questions of each task, from the first; ``None`` asks all.
        path: directory with further task definitions.
        run_code: whether tasks may run programs that the model wrote.
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
        """A hash of everything that decides the questions and how they are scored.

        lm-eval must be installed, as its version counts.
        """
        state: list[Any] = [self.names, self.limit, BATCH, version("lm_eval")]
        files = [] if self.path is None else sorted(p for p in self.path.rglob("*") if p.is_file())
        state += [hashlib.blake2b(file.read_bytes()).hexdigest() for file in files]
        return hashlib.blake2b(json.dumps(state).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class TaskScore:
    """The score of a task or of a group of tasks.

    Attributes:
        metric: name of the metric that counts: the first in the task's definition that is not
            better when lower, or the first where all are.
        score: its value, for most metrics the mean over questions.
        stderr: standard error of the mean over questions, those of a group taken together; ``None``
            with fewer than two ``answers``.
        fewshot: number of examples in a prompt.
        answers: score of each question, in order; empty where questions have no scores of their
            own.
        metrics: values of all of the task's metrics by name.
    """

    metric: str
    score: float
    stderr: float | None
    fewshot: int
    answers: tuple[float, ...]
    metrics: dict[str, float]


class Tasks:
    """The tasks of a request, loaded with their data.

    Args:
        request: which tasks.

    Raises:
        QuantineError: lm-eval is not installed.
        PlanError: there is no such task, its data cannot be loaded, or it runs programs that the
            model wrote and the request does not allow that.
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

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        bos: Bos = BOS_DEFAULT,
        ranks: Ranks = ALONE,
    ) -> dict[str, TaskScore]:
        """Score a model on every task.

        Programs that the model writes are run by `quantine.eval.code`, not by lm-eval.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            bos: ``"each"``: every question begins as the tokenizer begins a text; ``"first"``: none
                does, as in the lm-eval of the papers.
            ranks: the processes that share the batches of questions; each has the model, and gets
                the scores of one process.

        Returns:
            The scores by name of the task.

        Raises:
            PlanError: a task fails, or the tokenizer ends every text, so that answers would follow
                the end.
        """
        from quantine.eval.task_model import TaskModel

        frame = frame_of(tokenizer)
        begins = bos == "each" and bool(frame.before)
        if begins and frame.after:
            raise PlanError(
                "the tokenizer ends every text, and lm-eval would let answers follow the end: use "
                "bos first for tasks, which leaves out what it puts before and after"
            )
        wrapped = TaskModel(model, tokenizer, BATCH, begins, ranks)
        scores = {}
        for name in self.request.names:
            with _seeded():
                scores[name] = self._run_one(name, wrapped, ranks)
        return scores

    def _run_one(self, name: str, wrapped: Any, ranks: Ranks) -> TaskScore:
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
            if isinstance(error, QuantineError) or is_out_of_memory(error):
                raise
            raise PlanError(
                f"task {name} cannot be run ({cut(error)}): check its definition and data"
            ) from error
        if not unsafe:
            return _score_of(name, results)
        return ranks.of_first(lambda: _score_of_code(name, results))  # programs run once


def compare_tasks(
    scores: dict[str, TaskScore], reference: dict[str, TaskScore] | None
) -> dict[str, Any]:
    """Put the scores of a model and of its reference side by side.

    Args:
        scores: the model's scores by name of the task.
        reference: the reference's scores of the same tasks; ``None`` for no reference.

    Returns:
        By name of the task: ``metric``, ``score``, ``stderr``, ``fewshot``, number of
        ``questions``, all ``metrics``, ``reference_score``, and ``recovery`` (the model's score
        divided by the reference's) with its 95% confidence interval from ``recovery_low`` to
        ``recovery_high``. The last four are ``None`` where they cannot be computed.
    """
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
    """The lm-eval ``TaskManager`` that finds the definitions of the requested tasks.

    lm-eval's own thousands of definitions are indexed only where they are needed.

    Raises:
        PlanError: there is no such task.
    """
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
    """Load the task or group ``name`` with its data.

    Raises:
        PlanError: the definition or its data cannot be loaded.
    """
    try:
        return manager.load([name])
    except Exception as error:  # definitions and data sets fail in many ways, none of them typed
        raise PlanError(
            f"task {name} cannot be loaded ({cut(error)}): its data may need a connection to the "
            "hub; a task path can have a definition that reads local files"
        ) from error


def _runs_code(loaded: Any) -> bool:
    return any(bool(task.get_config("unsafe_code")) for task in loaded["tasks"].values())


def _score_of(name: str, results: Any) -> TaskScore:
    """Read the score of one task or group from lm-eval's ``results``."""
    leaves = _leaves(name, results)
    values = {**results["results"], **results.get("groups", {})}[name]
    named = {key: value for key, value in values.items() if "," in key and "_stderr" not in key}
    better = results["higher_is_better"]
    higher = (key for key in named if better.get(name, {}).get(key.split(",")[0]) is not False)
    key = next(higher, next(iter(named)))
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
    """Run the programs that the model wrote, and score the share that pass."""
    answers = tuple(
        float(passes(f"{_first(sample['filtered_resps'])}\n{sample['target']}"))
        for leaf in _leaves(name, results)
        for sample in results["samples"][leaf]
    )
    score, stderr = mean_with_error(answers)
    return TaskScore(PASS_AT_1, score, stderr, 0, answers, {PASS_AT_1: score})


def _first(answers: Any) -> str:
    """The first answer to a question, out of nested lists where several were drawn."""
    return answers if isinstance(answers, str) else _first(answers[0])


def _leaves(name: str, results: Any) -> list[str]:
    """Names of the tasks in a group, sorted; for a task only its own name."""
    below = results.get("group_subtasks", {}).get(name) or []
    found = [leaf for child in below for leaf in _leaves(child, results)]
    return sorted(found) if found else [name]


def _answers(samples: Sequence[Any], metric: str, kind: str) -> tuple[float, ...]:
    """The score of each question, in order of the questions; empty if some score is no number.

    Args:
        samples: for each task lm-eval's records of its questions.
        metric: name of the metric.
        kind: name of lm-eval's filter that answers have gone through.
    """
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
    """A context in which all random generators are seeded as by lm-eval; restores their states."""
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
