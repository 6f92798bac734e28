"""The verb `resume`: going on without the first command, and single layers done again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_resume import assert_same_run, files_of, report_of, stop_after

import quantine
from quantine import Calibration, Plan, cli
from quantine.core.tuning_spec import SETTINGS, Tuning
from quantine.formats.directory import PAGE, RUN_DIRECTORY, SCORES
from tiny_models import build, tiny_config

RULES = [{"match": "@blocks", "method": "spqr", "bits": 3, "group_size": 16}]
HEAD = {"match": "@head", "method": "rtn", "bits": 8, "group_size": -1}
QUIET = ["--quiet", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of four blocks."""
    return build(tiny_config("llama", num_hidden_layers=4), tmp_path_factory.mktemp("m") / "model")


@pytest.fixture(params=[False, True], ids=["quantized inputs", "float inputs"])
def plan(request: pytest.FixtureRequest) -> Plan:
    return Plan.from_dict({"rules": [HEAD, *RULES], "float_inputs": request.param})


def resumed(out: Path, *options: str) -> int:
    return cli.main(["resume", str(out), *options, *QUIET])


def test_a_run_goes_on_elsewhere_without_the_first_command(
    model: Path,
    short: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = Plan.from_dict({"rules": RULES})
    own = Path(shutil.copytree(model, tmp_path / "model"))
    whole = quantine.quantize(own, tmp_path / "whole", plan, short).path
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(KeyboardInterrupt):
            quantine.quantize(own, tmp_path / "out", plan, short)
    (tmp_path / "elsewhere").mkdir()
    out = Path(shutil.move(tmp_path / "out", tmp_path / "elsewhere" / "run"))
    moved = Path(shutil.move(own, tmp_path / "elsewhere" / "other name"))
    assert resumed(out) == 2
    assert "no such directory" in capsys.readouterr().err
    assert resumed(out, "--model", str(moved)) == 0
    assert_same_run(out, whole)


def test_layers_done_again_are_those_of_a_run_with_that_plan(
    plan: Plan, model: Path, short: Calibration, tmp_path: Path
) -> None:
    out = quantine.quantize(model, tmp_path / "out", plan, short).path
    before = {one["name"]: one for one in report_of(out)["layers"]}
    options = ["--redo", "*.layers.2.*_proj", "--set", "damp=0.05", "--set", "bits=4"]
    assert resumed(out, *options, "--calibration", short.source) == 0
    report = json.loads((out / "quantine_report.json").read_text())
    again = {one["name"]: one for one in report_of(out)["layers"]}
    changed = {name for name in before if before[name] != again[name]}
    blocks = {name.split(".")[2] for name in changed}
    assert blocks == ({"2"} if plan.float_inputs else {"2", "3"})
    assert {one["scheme"]["bits"] for name, one in again.items() if ".2." in name} == {4}
    whole = quantine.quantize(model, tmp_path / "whole", Plan.from_dict(report["plan"]), short)
    assert_same_run(out, whole.path)


def test_only_the_head_is_done_again(model: Path, short: Calibration, tmp_path: Path) -> None:
    plan = Plan.from_dict({"rules": [HEAD, *RULES]})
    out = quantine.quantize(model, tmp_path / "out", plan, short).path
    said = [out / SCORES, out / PAGE]  # of other weights
    for file in said:
        file.write_text("{}")
    options = ["--redo", "@head", "--set", "bits=6"]
    assert resumed(out, *options, "--calibration", short.source) == 0
    other = Plan.from_dict({"rules": [{**HEAD, "match": "lm_head", "bits": 6}, *RULES]})
    assert_same_run(out, quantine.quantize(model, tmp_path / "whole", other, short).path)
    assert not any(file.exists() for file in said)


@pytest.mark.parametrize("head", [[HEAD], []], ids=["with a rule", "without"])
def test_a_table_that_the_head_shares_is_done_again(
    head: list[dict[str, Any]], short: Calibration, tmp_path: Path
) -> None:
    tied = build(tiny_config("llama", tie_word_embeddings=True), tmp_path / "tied")
    plan = Plan.from_dict({"rules": [{**HEAD, "match": "@embedding"}, *head, *RULES]})
    out = quantine.quantize(tied, tmp_path / "out", plan, short).path
    options = ["--redo", "@embedding", "--set", "bits=6"]
    assert resumed(out, *options, "--calibration", short.source) == 0
    report = json.loads((out / "quantine_report.json").read_text())
    again = quantine.quantize(tied, tmp_path / "whole", Plan.from_dict(report["plan"]), short).path
    assert_same_run(out, again)
    quantine.load(out)


def test_what_was_there_stays_until_the_end(
    model: Path, short: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.from_dict({"rules": RULES})
    out = quantine.quantize(model, tmp_path / "out", plan, short).path
    before = files_of(out)
    options = ["--redo", "*.1.*", "--set", "damp=0.05", "--calibration", short.source]
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        assert resumed(out, *options) == 130
    unfinished = {k: v for k, v in files_of(out).items() if not k.startswith(RUN_DIRECTORY)}
    assert unfinished == before
    assert resumed(out) == 0
    assert files_of(out)["model.safetensors"] != before["model.safetensors"]
    report = json.loads((out / "quantine_report.json").read_text())
    whole = quantine.quantize(model, tmp_path / "whole", Plan.from_dict(report["plan"]), short)
    assert_same_run(out, whole.path)


def test_what_is_finished_is_tuned_as_if_at_once(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETTINGS, "quick", Tuning(steps=2, segments=2, block_steps=2))
    plan, text = Plan.from_dict({"rules": [HEAD, *RULES]}), Calibration(samples=8, seqlen=32)
    out = quantine.quantize(model, tmp_path / "out", plan, text).path
    assert resumed(out, "--tune", "quick") == 0
    tuned = replace(plan, tune=SETTINGS["quick"])
    assert_same_run(out, quantine.quantize(model, tmp_path / "whole", tuned, text).path)
    assert resumed(out, "--tune", "quick") == 2
    assert "tuned already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--redo", "*.9.*", "--set", "damp=0.05"], "matches no layer"),
        (["--redo", "*.1.*", "--set", "dump=0.05"], "has no parameter 'dump'"),
        (["--redo", "*.1.*", "--set", "damp"], "KEY=VALUE"),
        (["--redo", "*.1.*"], "give both"),
        (["--redo", "*.1.*", "--set", "match=x"], "--redo PATTERN says that"),
        (["--set", "damp=0.05"], "give both"),
        (["--redo", "*.1.*", "--set", "bits=4", "--tune", "quick"], "first --redo, then --tune"),
    ],
)
def test_what_cannot_be_done_again_is_refused(
    options: list[str],
    said: str,
    model: Path,
    short: Calibration,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = Plan.preset("rtn", bits=3, group_size=32)
    if "damp=0.05" in options or "dump=0.05" in options:
        plan = Plan.preset("gptq", bits=3, group_size=32)
    out = quantine.quantize(model, tmp_path / "out", plan, short).path
    before = files_of(out)
    assert resumed(out, *options, "--calibration", short.source) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert files_of(out) == before


def test_another_text_is_refused(
    model: Path, short: Calibration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan.preset("gptq", bits=3, group_size=32)
    out = quantine.quantize(model, tmp_path / "out", plan, short).path
    (tmp_path / "other.txt").write_text(Path(short.source).read_text()[50:])
    options = ["--redo", "*.1.*", "--set", "damp=0.05", "--calibration"]
    assert resumed(out, *options, str(tmp_path / "other.txt")) == 2
    assert "another calibration tokens" in capsys.readouterr().err
    assert resumed(tmp_path) == 2
    assert "holds no run" in capsys.readouterr().err
    (out / RUN_DIRECTORY).mkdir()  # as where a process was killed before it said more
    assert resumed(out) == 2
    assert "delete" in capsys.readouterr().err
