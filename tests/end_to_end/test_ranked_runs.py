"""Several processes share a run: the bytes are those of one, and one that is lost ends all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from test_mixtures import source_of
from test_resume import assert_same_run

from local_tasks import write_tasks
from quantine.formats.directory import RUN_DIRECTORY
from tiny_models import build, tiny_config

DRIVER: Final = Path(__file__).with_name("ranked_runs.py")
SHARDS: Final = 3
PLAN: Final = {
    "rules": [
        {"match": "@embedding", "method": "rtn", "bits": 8, "group_size": -1},
        {
            "match": "*.mlp.gate_proj",
            "method": "adadim",
            "choices": [
                {"method": "spqr", "bits": 3, "group_size": 32, "group_axis": axis}
                for axis in ("in", "out")
            ],
        },
        {"match": "*.mlp.*", "method": "gptq", "bits": 3, "group_size": 32},
        {"match": "@blocks", "method": "spqr", "bits": 3, "group_size": 16},
    ]
}
KILLS: Final = (0, 2)
"""The ranks of three that are killed, each when one block more is on disk."""
LEFT: Final = (1, 3)
"""Numbers of the ranks that then go on."""

Runs = dict[str, dict[str, Any]]


class Ordered:
    """The runs that are asked of the driver, by name.

    Args:
        root: where their output directories are.
        text: the file with their text.
    """

    def __init__(self, root: Path, text: Path) -> None:
        self.root, self.text = root, text
        self.runs: dict[str, dict[str, Any]] = {}

    def quantize(
        self, name: str, out: str, model: Path, options: list[str], ranks: int, **events: Any
    ) -> None:
        """Ask for a run of quantize that ``ranks`` share."""
        sampled = ["--calibration", str(self.text), "--samples", "6", "--seqlen", "32", "--quiet"]
        command = ["quantize", str(model), str(self.root / out), *sampled, *options]
        events = {"out": str(self.root / out), **events}
        self.runs[name] = {"ranks": ranks, "command": command, **events}

    def done(self) -> Runs:
        """What became of each run."""
        first = next(iter(self.runs.values()))["command"]
        warm = [*first[:2], str(self.root / "warm"), *first[3:]]
        file = self.root / "runs.json"
        file.write_text(json.dumps({"warm": warm, "runs": list(self.runs.values())}))
        done = subprocess.run(
            [sys.executable, str(DRIVER), str(file)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return dict(zip(self.runs, json.loads(done.stdout), strict=True))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def runs(root: Path, tiny: Callable[[str], Path], text_file: Path) -> Runs:
    """Every run of this module: the driver, which imports everything, is started once."""
    ordered = Ordered(root, text_file)
    model = build(tiny_config("llama_tied", num_hidden_layers=4), root / "model")
    (root / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    shards = ["--shards", str(SHARDS)]
    planned = ["--plan", str(root / "plan.yaml"), *shards]
    for ranks in (1, 2):
        ordered.quantize(f"plan {ranks}", f"plan-{ranks}", model, planned, ranks)
    for blocks, (victim, ranks) in enumerate(zip(KILLS, LEFT, strict=True), 1):
        out = f"killed-{victim}"
        ordered.quantize(f"kill {victim}", out, model, planned, 3, kill=victim, parts=blocks)
        # Without --shards it is that of the first command.
        ordered.quantize(f"left {victim}", out, model, [*planned[:2], "--resume"], ranks)
    ordered.runs["left 2"]["command"] = ["resume", str(root / "killed-2"), "--quiet"]
    ordered.quantize("memory", "failed", model, planned, 2, error="memory")
    ordered.quantize("bug", "failed", model, [*planned, "--resume"], 2, error="bug")
    ordered.quantize("hung", "failed", model, [*planned, "--resume"], 2, stop=0)
    ordered.quantize("mended", "failed", model, [*planned, "--resume"], 2)
    ordered.quantize("too many", "none", model, ["--shards", "1"], 2)
    tuned = {**PLAN, "tune": {"steps": 2, "segments": 2, "block_steps": 3, "rate": 0.002}}
    (root / "tuned.yaml").write_text(yaml.safe_dump(tuned))
    several: dict[str, tuple[Path, list[str]]] = {
        "activations": (tiny("opt"), ["--scheme", "W4A4KV", "--group-size", "32"]),
        "rotated": (tiny("llama"), ["--scheme", "W4A4-strict-rotated", "--group-size", "32"]),
        "tuning": (model, ["--plan", str(root / "tuned.yaml")]),
        "budget": (tiny("llama"), ["--bits-per-weight", "3.5"]),
        "experts": (
            source_of("qwen3_moe", root / "moe"),
            ["--method", "gptq", "--group-size", "16"],
        ),
    }
    for name, (source, options) in several.items():
        for ranks in (1, 2):
            ordered.quantize(
                f"{name} {ranks}", f"{name}-{ranks}", source, [*options, *shards], ranks
            )
    measured = ["--text", str(text_file), "--window", "64", "--limit", "5", "--quiet"]
    tasks = ["tiny_odd", "tiny_even", "tiny_text", "tiny_code"]
    measured += ["--tasks", ",".join(tasks), "--task-path", str(write_tasks(root / "tasks"))]
    measured += ["--run-code"]
    for ranks in (1, 3):
        out = root / f"scores-{ranks}.json"
        asked = ["--reference", str(model), *measured, "--json", str(out)]
        ordered.runs[f"eval {ranks}"] = {
            "ranks": ranks,
            "command": ["eval", str(root / "plan-1"), *asked],
        }
    text = ["--calibration", str(text_file), "--samples", "6", "--seqlen", "32", *shards]
    for ranks in (1, 2):
        compared = ["--plans", "preset:gptq:group_size=32", "--out", str(root / f"rows-{ranks}")]
        ordered.runs[f"compare {ranks}"] = {
            "ranks": ranks,
            "command": ["compare", str(model), *compared, *text, *measured],
        }
    return ordered.done()


def sentences(said: str) -> list[str]:
    """The lines of quantine on standard error."""
    return [line for line in said.splitlines() if line.startswith("quantine: ")]


def test_any_number_of_ranks_makes_the_same_bytes(runs: Runs, root: Path) -> None:
    for ranks in (1, 2):
        assert runs[f"plan {ranks}"] == {"statuses": [0] * ranks, "said": ""}
    assert_same_run(root / "plan-2", root / "plan-1")
    report = json.loads((root / "plan-2" / "quantine_report.json").read_text())
    assert report["run"]["ranks"] == 2
    assert report["calibration"]["shards"] == int(report["identity"]["shards"]) == SHARDS


@pytest.mark.parametrize("name", ["activations", "rotated", "tuning", "budget", "experts"])
def test_what_one_rank_decides_does_not_depend_on_the_others(
    name: str, runs: Runs, root: Path
) -> None:
    assert runs[f"{name} 2"] == {"statuses": [0, 0], "said": ""}
    assert_same_run(root / f"{name}-2", root / f"{name}-1")


@pytest.mark.parametrize("victim", KILLS)
def test_a_lost_rank_ends_the_run_and_others_go_on(victim: int, runs: Runs, root: Path) -> None:
    killed = runs[f"kill {victim}"]
    assert killed["statuses"] == [-9 if rank == victim else 2 for rank in range(3)]
    assert sentences(killed["said"]) == [
        f"quantine: rank {victim} of 3 ended or hung: continue with --resume, with any number of "
        "ranks"
    ]
    left = dict(zip(KILLS, LEFT, strict=True))[victim]
    assert runs[f"left {victim}"] == {"statuses": [0] * left, "said": ""}
    assert_same_run(root / f"killed-{victim}", root / "plan-1")


def test_a_rank_that_fails_is_named_and_nothing_is_lost(runs: Runs, root: Path) -> None:
    assert runs["memory"]["statuses"] == [2, 2]
    (said,) = sentences(runs["memory"]["said"])
    assert "rank 1 ran out of memory (cannot allocate memory): continue with --resume" in said
    assert runs["bug"]["statuses"] == [2, 1]
    (said,) = sentences(runs["bug"]["said"])
    assert "rank 1 failed (ValueError('a bug')): mend that and continue with --resume" in said
    assert runs["mended"]["statuses"] == [0, 0]
    assert_same_run(root / "failed", root / "plan-1")


def test_a_rank_that_hangs_is_noticed(runs: Runs) -> None:
    assert runs["hung"]["statuses"] == [-9, 2]
    (said,) = sentences(runs["hung"]["said"])
    assert "rank 0 of 2 ended or hung: continue with --resume" in said


def test_too_few_shards_are_refused_by_one_sentence(runs: Runs, root: Path) -> None:
    assert runs["too many"]["statuses"] == [2, 2]
    (said,) = sentences(runs["too many"]["said"])
    assert "--shards 1 is too few for 2 ranks: give a new run --shards 2 or more" in said
    assert not (root / "none").exists()


def test_scores_are_those_of_one_process(runs: Runs, root: Path) -> None:
    assert runs["eval 3"]["statuses"] == [0, 0, 0]
    one, three = (json.loads((root / f"scores-{n}.json").read_text()) for n in (1, 3))
    for scores in (one, three):
        for text in scores["texts"].values():
            del text["seconds"]
    assert three == one
    assert len(one["tasks"]) == 4
    for task in one["tasks"].values():
        assert task["reference_score"] is not None


def test_rows_are_those_of_one_process(runs: Runs, root: Path) -> None:
    assert runs["compare 2"]["statuses"] == [0, 0]
    rows = sorted(path.name for path in (root / "rows-1" / "rows").iterdir())
    assert len(rows) == 2
    for name in rows:
        one, two = (json.loads((root / f"rows-{n}" / "rows" / name).read_text()) for n in (1, 2))
        for row in (one, two):
            for text in row["texts"].values():
                del text["seconds"]
            for measured in ("seconds", "peak_memory_bytes", "tokens_per_second"):
                del row[measured]
        assert two == one
    models = [root / f"rows-{n}" / "models" / "gptq,group_size=32" for n in (1, 2)]
    assert_same_run(*models)
    assert not (models[0] / RUN_DIRECTORY).exists()
