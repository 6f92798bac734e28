"""Tasks: lm-eval's own scores, exactly; and a packed model's those of its float copy."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from torch import Tensor

import quantine
from local_tasks import QUESTIONS, write_tasks
from quantine import PlanError, QuantineError, cli
from quantine.calibrate.bos import BOS_CHOICES, Bos
from quantine.eval.predictions import Predictions
from quantine.eval.tasks import BATCH, FEWSHOT, TaskRequest, Tasks
from quantine.ranks.ranks import ALONE
from quantine.source.locate import locate
from tiny_models import BOS, EOS, byte_tokenizer, oracle_weights, with_weights

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
# What lm-eval and the libraries below it warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

Tiny = Callable[[str], Path]
Packed = Callable[[str, str], Path]
NAMES = ("tiny_odd", "tiny_even", "tiny_group")


@pytest.fixture(scope="module")
def task_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


def direct(model: Any, tokenizer: Any, task_path: Path, name: str) -> dict[str, Any]:
    """What lm-eval says when it is run without quantine."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_path), include_defaults=False)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    found: Any = simple_evaluate(wrapped, tasks=[name], task_manager=manager)
    return found["results"] | found.get("groups", {})


def test_scores_are_those_of_lm_eval(tiny: Tiny, task_path: Path) -> None:
    source = locate(tiny("llama"))
    found = quantine.evaluate(tiny("llama"), [], tasks=TaskRequest(NAMES, path=task_path))["tasks"]
    model, tokenizer = source.float_model(torch.float32), source.tokenizer()
    for name in NAMES:
        expected = direct(model, tokenizer, task_path, name)[name]
        assert found[name]["metric"] == "acc"
        assert found[name]["score"] == expected["acc,none"]
        if name != "tiny_group":
            assert found[name]["stderr"] == pytest.approx(expected["acc_stderr,none"])
            assert found[name]["metrics"]["acc_norm"] == expected["acc_norm,none"]
            assert found[name]["questions"] == QUESTIONS
    assert found["tiny_group"]["questions"] == 2 * QUESTIONS
    assert 0 < found["tiny_group"]["score"] < 1


@pytest.mark.parametrize("name", [*NAMES[:2], "tiny_code"])
def test_batches_are_those_of_lm_eval(name: str, tiny: Tiny, task_path: Path) -> None:
    """Two ranks that are dealt them in turn compute what one would: the same bits."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from quantine.eval.task_model import TaskModel

    source = locate(tiny("llama"))
    model, tokenizer = source.float_model(torch.float32), source.tokenizer()
    seen: list[Tensor] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    manager = TaskManager(include_path=str(task_path), include_defaults=False)
    answers, inputs = [], []
    for wrapped in (
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, add_bos_token=True),
        TaskModel(model, tokenizer, BATCH, True, ALONE),
    ):
        seen.clear()
        tasks: Any = manager.load([name])
        evaluate(wrapped, tasks, bootstrap_iters=0, confirm_run_unsafe_code=True)
        answers.append(
            [request.resps for task in tasks["tasks"].values() for request in task.instances]
        )
        inputs.append([tokens.tolist() for tokens in seen])
    assert inputs[0]
    assert inputs[1] == inputs[0]
    assert answers[1] == answers[0]


def test_a_task_without_a_metric_to_raise_has_a_score(tiny: Tiny, task_path: Path) -> None:
    source, request = locate(tiny("llama")), TaskRequest(("tiny_text",), path=task_path)
    found = quantine.evaluate(source.directory, [], tasks=request)["tasks"]["tiny_text"]
    assert (found["metric"], found["stderr"], found["recovery"]) == ("word_perplexity", None, None)
    expected = direct(
        source.float_model(torch.float32), source.tokenizer(), task_path, "tiny_text"
    )["tiny_text"]
    # Texts of several windows are batched otherwise, and sums round otherwise.
    for name, value in found["metrics"].items():
        assert value == pytest.approx(expected[f"{name},none"], rel=1e-4)
    assert found["score"] == found["metrics"]["word_perplexity"]


@pytest.mark.parametrize("name", ["llama", "llama_tied", "opt"])
def test_a_packed_model_answers_as_its_float_copy(
    name: str, tiny: Tiny, packed: Packed, task_path: Path
) -> None:
    out = packed(name, "mixed")
    model, tokenizer = quantine.load(out, torch.float32)
    tasks = Tasks(TaskRequest(NAMES, path=task_path))
    found = tasks.run(model, tokenizer)
    copy = with_weights(tiny(name), oracle_weights(out))
    expected = tasks.run(copy, tokenizer)
    for task in NAMES:
        assert found[task].answers == expected[task].answers
        assert found[task].metrics == expected[task].metrics


def test_recovery_is_the_ratio_of_scores_and_the_reference_answers_once(
    tiny: Tiny, packed: Packed, task_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = TaskRequest(NAMES, path=task_path)
    options: dict[str, Any] = {"reference": tiny("llama"), "cache": tmp_path, "tasks": request}
    plain = quantine.evaluate(tiny("llama"), [], tasks=request)["tasks"]
    first = quantine.evaluate(packed("llama", "gptq"), [], **options)["tasks"]
    for name in NAMES:
        assert first[name]["reference_score"] == plain[name]["score"]
        expected = first[name]["score"] / plain[name]["score"]
        assert first[name]["recovery"] == pytest.approx(expected)
        assert first[name]["recovery_low"] <= first[name]["recovery"]
        assert plain[name]["recovery"] is None

    def refuse(_: object) -> Any:
        raise AssertionError("the reference is asked again")

    monkeypatch.setattr(Predictions, "model", property(refuse))
    assert quantine.evaluate(packed("llama", "gptq"), [], **options)["tasks"] == first
    fewer = {**options, "tasks": TaskRequest(NAMES, limit=3, path=task_path)}
    with pytest.raises(AssertionError, match="asked again"):
        quantine.evaluate(packed("llama", "gptq"), [], **fewer)


@pytest.mark.parametrize("bos", BOS_CHOICES)
def test_questions_begin_as_the_tokenizer_begins_a_text(
    bos: Bos, tiny: Tiny, task_path: Path
) -> None:
    source = locate(tiny("llama"))
    model = source.float_model(torch.float32)
    seen: list[int] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, args: seen.extend(args[0][:, 0].tolist()))
    Tasks(TaskRequest(("tiny_odd",), path=task_path)).run(model, source.tokenizer(), bos)
    assert seen
    assert {token == BOS for token in seen} == {bos == "each"}


def test_answers_of_the_other_protocol_are_not_taken(
    tiny: Tiny, packed: Packed, task_path: Path, tmp_path: Path
) -> None:
    request = TaskRequest(("tiny_odd",), path=task_path)
    options: dict[str, Any] = {"reference": tiny("llama"), "cache": tmp_path, "tasks": request}
    for bos in BOS_CHOICES:
        found = quantine.evaluate(packed("llama", "gptq"), [], **options, bos=bos)
        plain = quantine.evaluate(tiny("llama"), [], tasks=request, bos=bos)
        assert found["bos"] == bos
        expected = plain["tasks"]["tiny_odd"]["score"]
        assert found["tasks"]["tiny_odd"]["reference_score"] == expected
    assert len(list(tmp_path.glob("*/tasks-*.json"))) == 2


def test_a_tokenizer_that_ends_every_text_is_refused(tiny: Tiny, task_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    model = locate(tiny("llama")).float_model(torch.float32)
    tasks = Tasks(TaskRequest(("tiny_odd",), 2, task_path))
    with pytest.raises(PlanError, match=r"ends every text.*bos first"):
        tasks.run(model, tokenizer)
    assert tasks.run(model, tokenizer, "first") == tasks.run(model, byte_tokenizer(bos=False))


def test_the_limit_takes_the_first_questions(tiny: Tiny, task_path: Path) -> None:
    model, tokenizer = locate(tiny("llama")).float_model(torch.float32), None
    tokenizer = locate(tiny("llama")).tokenizer()
    every = Tasks(TaskRequest(("tiny_odd",), path=task_path)).run(model, tokenizer)
    some = Tasks(TaskRequest(("tiny_odd",), 5, task_path)).run(model, tokenizer)
    assert some["tiny_odd"].answers == every["tiny_odd"].answers[:5]


def test_no_generator_of_the_user_is_touched(tiny: Tiny, task_path: Path) -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    quantine.evaluate(tiny("llama"), [], tasks=TaskRequest(("tiny_odd",), 2, task_path))
    drawn = (random.random(), np.random.rand(), float(torch.rand(1)))
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert drawn == (random.random(), np.random.rand(), float(torch.rand(1)))


def test_programs_run_only_with_leave_and_count_when_they_pass(tiny: Tiny, task_path: Path) -> None:
    with pytest.raises(PlanError, match=r"tiny_code runs programs.*--run-code"):
        quantine.evaluate(tiny("llama"), [], tasks=TaskRequest(("tiny_code",), path=task_path))
    request = TaskRequest(("tiny_code",), path=task_path, run_code=True)
    found = quantine.evaluate(tiny("llama"), [], tasks=request)["tasks"]["tiny_code"]
    # Whatever the model writes is a comment: the second of four programs is right.
    assert (found["metric"], found["score"], found["questions"]) == ("pass@1", 0.25, 4)


def test_unknown_tasks_and_bad_requests_are_refused(
    task_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # lm-eval's own thousands of definitions take half a minute to read: here they are one.
    own = tmp_path / "own"
    own.mkdir()
    (own / "own.yaml").write_text("task: own_task\ndataset_path: json\n")
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(own / "manager.py"))
    with pytest.raises(PlanError, match="no task no_such_task:"):
        Tasks(TaskRequest(("tiny_odd", "own_task", "no_such_task"), path=task_path))
    with pytest.raises(PlanError, match="at least 1 question"):
        TaskRequest(("tiny_odd",), limit=0)
    with pytest.raises(PlanError, match="no directory of task definitions"):
        TaskRequest(("tiny_odd",), path=tmp_path / "missing")
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\n")
    monkeypatch.chdir(own)  # where data are looked for, in all directories below
    with pytest.raises(PlanError, match="task broken cannot be loaded"):
        Tasks(TaskRequest(("broken",), path=tmp_path))


def test_without_lm_eval_the_install_line_is_given(
    task_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantine.eval.tasks.find_spec", lambda _: None)
    with pytest.raises(QuantineError, match=r"pip install 'quantine\[eval\]'"):
        Tasks(TaskRequest(("tiny_odd",), path=task_path))


def test_the_papers_tasks_have_a_count_of_examples() -> None:
    """Zero-shot in SpQR's and RPTQ's tables, five examples for MMLU in AdaDim's."""
    asked = "winogrande,piqa,hellaswag,arc_easy,arc_challenge,lambada_openai,openbookqa,boolq"
    assert all(FEWSHOT[name] == 0 for name in asked.split(","))
    assert FEWSHOT["mmlu"] == 5


def test_eval_shows_tasks(
    tiny: Tiny,
    packed: Packed,
    task_path: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.environ", dict(__import__("os").environ))
    arguments = ["eval", str(packed("llama", "rtn")), "--text", str(text_file), "--window", "32"]
    arguments += ["--limit", "4", "--tasks", "tiny_odd,tiny_group", "--task-path", str(task_path)]
    arguments += ["--task-limit", "6", "--reference", str(tiny("llama"))]
    assert cli.main([*arguments, "--json", str(tmp_path / "scores.json")]) == 0
    shown = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["tasks"]["tiny_group"]["questions"] == 12
    row = next(line for line in shown.splitlines() if line.startswith("tiny_odd "))
    assert "6 questions, 0 examples each" in row
    assert f"{scores['tasks']['tiny_odd']['score']:.2%}" in row
