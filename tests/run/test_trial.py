"""One block, tried, predicts what the run takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import quantine
from quantine import Calibration, Plan, PlanError, cli
from quantine.run.estimate import estimate
from quantine.run.prepare import prepare
from quantine.run.trial import try_block

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("preset", ["gptq", "spqr"])
def test_the_output_is_predicted(
    preset: str, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    plan = Plan.preset(preset, bits=3, group_size=16)
    (tmp_path / "scratch").mkdir()
    trial = try_block(prepare(tiny("llama"), plan, short), scratch=tmp_path / "scratch")
    out = quantine.quantize(tiny("llama"), tmp_path / "out", plan, short).path
    written = sum(path.stat().st_size for path in out.glob("model*.safetensors"))
    assert trial.output == pytest.approx(written, rel=0.02)  # headers of parts are some more
    assert (trial.block, trial.blocks) == (1, 2)
    assert trial.seconds > 1.5 * trial.block_seconds > 0
    assert trial.peak_memory > 50_000_000
    assert list((tmp_path / "scratch").iterdir()) == []


def test_without_outliers_disk_is_that_of_arithmetic(tiny: Tiny, short: Calibration) -> None:
    job = prepare(tiny("llama"), Plan.preset("gptq", bits=3, group_size=32), short)
    # Arithmetic counts what stays as it is in the dtypes of files in 16 bit; this one has 32.
    more = sum(2 * rows * columns for rows, columns in ((300, 64), (300, 64)))
    size = estimate(job).disk_while_running
    assert try_block(job).disk_while_running == pytest.approx(size, abs=more)


def test_disk_is_predicted(
    tiny: Tiny, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = Calibration(str(text_file), samples=512, seqlen=128)
    plan, found, replace = Plan.preset("gptq", bits=3, group_size=32), [0], Path.replace
    trial = try_block(prepare(tiny("llama"), plan, calibration))

    def watched(self: Path, target: Path) -> Path:
        # What is written meets what it replaces here, and nowhere is there more on disk.
        if "shards" not in self.parts:
            files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
            found.append(sum(path.stat().st_size for path in files))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    quantine.quantize(tiny("llama"), tmp_path / "out", plan, calibration)
    assert trial.disk_while_running == pytest.approx(max(found), rel=0.01)


def test_plan_prints_both_predictions(
    tiny: Tiny, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["--calibration", str(text_file), "--samples", "4", "--seqlen", "32"]
    command = ["plan", str(tiny("llama")), "--bits", "3", *text, "--probe"]
    assert cli.main([*command, "--json", str(tmp_path / "plan.json")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "block 2 of 2 tried" in said
    assert "peak memory: about" in said
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["probed"]["blocks"] == 2
    assert found["predicted"]["output_bytes"] > 0


def test_a_budget_cannot_be_foreseen(tiny: Tiny, short: Calibration) -> None:
    with pytest.raises(PlanError, match="--probe cannot foresee"):
        try_block(prepare(tiny("llama"), Plan.budget(3.5), short))
