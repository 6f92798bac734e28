"""A run stopped at any point is continued, and its files have the bytes of an unbroken run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import quantine
from quantine import Calibration, Plan
from quantine.formats.directory import RUN_DIRECTORY
from quantine.run.store import RunStore
from tiny_models import build, tiny_config

DRIVER = Path(__file__).with_name("killed_runs.py")
REPORT = "quantine_report.json"
PLAN = {
    "rules": [
        {"match": "@embedding", "method": "rtn", "bits": 8, "group_size": -1},
        {"match": "*.mlp.*", "method": "gptq", "bits": 3, "group_size": 32, "groups": "refit"},
        {"match": "@blocks", "method": "gptq", "bits": 4, "group_size": 32},
    ]
}


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file below ``directory``, the report left out."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != REPORT
    }


def report_of(directory: Path) -> dict[str, Any]:
    """The report without what a clock or the memory of a process decides."""
    report = json.loads((directory / REPORT).read_text())
    del report["run"]
    for layer in report["layers"]:
        del layer["seconds"]
    return dict(report)


def assert_same_run(a: Path, b: Path) -> None:
    """Both directories hold the same bytes and nothing unfinished."""
    first, second = files_of(a), files_of(b)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert report_of(a) == report_of(b)
    assert not [path for path in a.iterdir() if path.name.startswith(RUN_DIRECTORY)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of four blocks."""
    return build(
        tiny_config("llama_tied", num_hidden_layers=4), tmp_path_factory.mktemp("m") / "model"
    )


@pytest.mark.parametrize(
    ("spills", "kills"), [(False, 10), (True, 4)], ids=["in memory", "spilled"]
)
def test_killed_runs_end_with_the_same_bytes(
    spills: bool, kills: int, model: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    calibration = ["--calibration", str(text_file), "--samples", "4", "--seqlen", "32"]
    request = {
        "command": [str(model), "--plan", str(tmp_path / "plan.yaml"), *calibration],
        "root": str(tmp_path),
        "kills": kills,
        "blocks": 4,
        "seed": 6,
        "spills": spills,
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(tmp_path / "request.json")],
        check=True,
        capture_output=True,
        text=True,
    )
    answer = json.loads(done.stdout)
    assert len(answer["killed"]) == kills + 1
    for run in answer["killed"]:
        assert_same_run(Path(run["out"]), Path(answer["whole"]))
    # The moments were spread: some runs died with some blocks on disk and others missing.
    blocks = [sum("block-" in name for name in run["found"]) for run in answer["killed"]]
    assert len(set(blocks)) > 2


def stop_after(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next run end, as by Ctrl-C, before it commits block number ``blocks``."""
    commit = RunStore.commit

    def stopping(self: RunStore, part: str, *rest: Any) -> None:
        if part == f"block-{blocks:05}":
            raise KeyboardInterrupt
        commit(self, part, *rest)

    monkeypatch.setattr(RunStore, "commit", stopping)


@pytest.fixture
def unfinished(
    model: Path, short: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A run that was interrupted in its third block."""
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(KeyboardInterrupt):
            quantine.quantize(model, tmp_path / "out", Plan.from_dict(PLAN), short)
    return tmp_path / "out"


def test_an_interrupted_run_goes_on_where_it_stopped(
    unfinished: Path, model: Path, short: Calibration, tmp_path: Path
) -> None:
    parts = unfinished / RUN_DIRECTORY / "parts"
    before = {p.name: p.stat().st_mtime_ns for p in parts.iterdir() if "block-" in p.name}
    assert len(before) == 4  # two blocks, each weights and reports

    class Watch:
        solved: list[str] = []  # noqa: RUF012

        def __getattr__(self, event: str) -> Callable[..., None]:
            return lambda *_: None

        def layer(self, report: dict[str, Any]) -> None:
            self.solved.append(report["name"])

    watch: Any = Watch()
    quantine.quantize(model, unfinished, Plan.from_dict(PLAN), short, resume=True, progress=watch)
    assert {name.split(".")[2] for name in watch.solved} == {"2", "3"}
    whole = quantine.quantize(model, tmp_path / "whole", Plan.from_dict(PLAN), short).path
    assert_same_run(unfinished, whole)


def test_an_unfinished_run_is_refused_without_resume(
    unfinished: Path, model: Path, short: Calibration
) -> None:
    before = snapshot(unfinished)
    with pytest.raises(quantine.OutputError, match="--resume"):
        quantine.quantize(model, unfinished, Plan.from_dict(PLAN), short)
    assert snapshot(unfinished) == before


OTHER = {
    "plan": ({"plan": Plan.preset("gptq", bits=5, group_size=32)}, "plan"),
    "seed": ({"seed": 1}, "calibration tokens"),
    "samples": ({"samples": 3}, "calibration tokens"),
    "model": ({"model": True}, "weights"),
}


@pytest.mark.parametrize(("change", "named"), OTHER.values(), ids=OTHER)
@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
def test_a_run_resumes_only_with_the_same_inputs(
    change: dict[str, Any],
    named: str,
    finished: bool,
    unfinished: Path,
    model: Path,
    short: Calibration,
    tmp_path: Path,
) -> None:
    if finished:
        quantine.quantize(model, unfinished, Plan.from_dict(PLAN), short, resume=True)
    before = snapshot(unfinished)
    if "model" in change:
        model = build(tiny_config("llama_tied", num_hidden_layers=4), tmp_path / "other", seed=1)
    calibration = Calibration(
        short.source, change.get("samples", short.samples), 32, change.get("seed", 0)
    )
    plan = change.get("plan", Plan.from_dict(PLAN))
    with pytest.raises(quantine.ResumeMismatch, match=f"another {named}:"):
        quantine.quantize(model, unfinished, plan, calibration, resume=True)
    assert snapshot(unfinished) == before


def test_resuming_a_finished_directory_changes_nothing(
    model: Path, short: Calibration, tmp_path: Path
) -> None:
    first = quantine.quantize(model, tmp_path / "out", Plan.from_dict(PLAN), short)
    before = snapshot(first.path)
    again = quantine.quantize(model, first.path, Plan.from_dict(PLAN), short, resume=True)
    assert again == first
    assert snapshot(first.path) == before
    with pytest.raises(quantine.OutputError, match="not empty"):
        quantine.quantize(model, first.path, Plan.from_dict(PLAN), short)
    assert snapshot(first.path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_foreign_directory_is_never_touched(
    resume: bool, model: Path, short: Calibration, tmp_path: Path
) -> None:
    foreign = tmp_path / "thesis"
    (foreign / "drafts").mkdir(parents=True)
    (foreign / "drafts" / "one.txt").write_text("precious")
    before = snapshot(foreign)
    with pytest.raises(quantine.OutputError, match="choose another output path"):
        quantine.quantize(model, foreign, Plan.from_dict(PLAN), short, resume=resume)
    assert snapshot(foreign) == before
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(quantine.OutputError, match="not a directory"):
        quantine.quantize(model, file, Plan.from_dict(PLAN), short, resume=resume)
    assert file.read_text() == "precious"


def test_the_model_directory_is_no_output_directory(model: Path, short: Calibration) -> None:
    before = snapshot(model)
    with pytest.raises(quantine.OutputError, match="not empty"):
        quantine.quantize(model, model, Plan.from_dict(PLAN), short)
    assert snapshot(model) == before


def test_the_users_random_numbers_are_left_alone(
    model: Path, short: Calibration, tmp_path: Path
) -> None:
    import random

    import torch

    before = (random.getstate(), torch.get_rng_state().tolist())
    quantine.quantize(model, tmp_path / "out", Plan.from_dict(PLAN), short)
    assert (random.getstate(), torch.get_rng_state().tolist()) == before


def snapshot(directory: Path) -> list[tuple[str, str, int]]:
    """Name, hash and time of change of everything below ``directory``."""
    entries = []
    for folder, _, names in sorted(os.walk(directory)):
        entries.append((folder, "", os.stat(folder).st_mtime_ns))
        for name in sorted(names):
            path = Path(folder) / name
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            entries.append((str(path), digest, path.stat().st_mtime_ns))
    return entries
