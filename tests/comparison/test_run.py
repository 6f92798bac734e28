"""Comparisons: their rows, their tables, and what an interruption leaves."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantine
from quantine import Calibration, OutputError, Plan, ResumeMismatch, cli
from quantine.comparison import run as run_module
from quantine.comparison.run import Measured, compare
from quantine.comparison.short_forms import plans_of
from quantine.comparison.table import markdown, pareto_front
from quantine.eval.comparison_row import loss_of_quality

Tiny = Callable[[str], Path]
POINTS = (
    "preset:rtn:bits=3:group_size=32",
    "preset:gptq:bits=3:group_size=32:arithmetic=exact",
    "5",
)


@pytest.fixture(scope="module")
def measured(text_file: Path) -> Measured:
    return Measured((str(text_file),), window=32, limit=6)


@pytest.fixture(scope="module")
def rows(
    tiny: Tiny,
    short: Calibration,
    measured: Measured,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("comparison") / "out"
    return compare(tiny("llama"), plans_of(POINTS), out, short, measured)


def test_rows_are_what_eval_and_quantize_say(
    rows: list[dict[str, Any]],
    tiny: Tiny,
    packed: Callable[[str, str], Path],
    measured: Measured,
) -> None:
    assert [row["name"] for row in rows] == [
        "float",
        "rtn,bits=3,group_size=32",
        "gptq,bits=3,group_size=32,arithmetic=exact",
        "5",
    ]
    options: dict[str, Any] = {"window": measured.window, "limit": measured.limit}
    plain = quantine.evaluate(tiny("llama"), measured.texts, **options)
    alone = quantine.evaluate(
        packed("llama", "gptq"), measured.texts, **options, reference=tiny("llama")
    )
    for row, expected in ((rows[0], plain), (rows[2], alone)):
        for key in ("bits_per_weight", "model_bytes"):
            assert row[key] == expected[key]
        for name, text in expected["texts"].items():
            found = row["texts"][name]
            assert found["perplexity"] == text["perplexity"]
            assert found["recovery"] == text["recovery"]
            assert found["kl"] == (None if row is rows[0] else pytest.approx(text["kl"], abs=2e-4))
    for row in rows:
        speed = row["tokens_per_second"]
        assert 0 < speed["low"] <= speed["median"] <= speed["high"]
    assert rows[3]["bits_per_weight"] <= 5
    assert all(row["seconds"] > 0 and row["peak_memory_bytes"] > 5e7 for row in rows[1:])


def test_the_front_is_what_no_other_row_beats(rows: list[dict[str, Any]]) -> None:
    front = pareto_front(rows)
    quantized = {row["name"]: (row["bits_per_weight"], loss_of_quality(row)) for row in rows[1:]}
    for name, (bits, loss) in quantized.items():
        assert loss is not None
        beaten = any(
            b <= bits and (other or 0) <= loss and (b, other) != (bits, loss)
            for b, other in quantized.values()
        )
        assert (name in front) == (not beaten)
    assert front


def test_the_table_has_every_row_and_its_numbers(rows: list[dict[str, Any]]) -> None:
    lines = markdown(rows).splitlines()
    for row in rows:
        line = next(
            x for x in lines if x.startswith((f"| {row['name']} |", f"| **{row['name']}** |"))
        )
        assert f" {row['bits_per_weight']:.3f} |" in line
        assert f" {row['texts']['text.txt']['perplexity']:.3f} ± " in line
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("a finished row is made again")


def test_a_column_is_one_text_whatever_the_order_in_a_row(rows: list[dict[str, Any]]) -> None:
    (text,) = rows[0]["texts"].values()
    loud = {**text, "perplexity": 98765.4321}
    first = {**rows[0], "texts": {"quiet": text, "loud": loud}}
    later = {**rows[1], "texts": {"loud": loud, "quiet": text}}
    lines = [line for line in markdown([first, later]).splitlines() if line.startswith("|")]
    heads, _, *found = (line.split(" | ") for line in lines)
    column = heads.index("loud perplexity")
    assert len(found) == 2
    assert all(cells[column].startswith("98765.432") for cells in found)


def test_finished_rows_stay_and_the_list_may_grow(
    tiny: Tiny,
    short: Calibration,
    measured: Measured,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = compare(tiny("llama"), plans_of(POINTS[:1]), tmp_path / "out", short, measured)
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "quantize", refuse)
        again = compare(tiny("llama"), plans_of(POINTS[:1]), tmp_path / "out", short, measured)
        assert again == first
        with pytest.raises(AssertionError, match="made again"):
            compare(tiny("llama"), plans_of(POINTS[:2]), tmp_path / "out", short, measured)
    grown = compare(tiny("llama"), plans_of(POINTS[:2]), tmp_path / "out", short, measured)
    assert grown[:2] == first


def test_other_conditions_are_refused(
    tiny: Tiny, short: Calibration, measured: Measured, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    plans = plans_of(POINTS[:1])
    compare(tiny("llama"), plans, out, short, measured)
    others: dict[str, tuple[Any, ...]] = {
        "model": (tiny("llama_tied"), plans, out, short, measured),
        "calibration": (tiny("llama"), plans, out, Calibration(short.source, 5, 32), measured),
        "texts": (tiny("llama"), plans, out, short, Measured(measured.texts, 32, 5)),
        "another bos": (
            tiny("llama"),
            plans,
            out,
            short,
            Measured(measured.texts, 32, 6, bos="first"),
        ),
        "another plan of this name": (
            tiny("llama"),
            {next(iter(plans)): Plan.preset("rtn", bits=5, group_size=32)},
            out,
            short,
            measured,
        ),
    }
    for message, arguments in others.items():
        with pytest.raises(ResumeMismatch, match=message):
            compare(*arguments)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError, match="no comparison"):
        compare(tiny("llama"), plans, tmp_path / "full", short, measured)


def test_a_killed_comparison_goes_on(
    tiny: Tiny, short: Calibration, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["compare", str(tiny("opt")), "--plans", ",".join(POINTS[:2]), "--out", str(out)]
    arguments += ["--calibration", short.source, "--samples", "4", "--seqlen", "32", "--quiet"]
    arguments += ["--text", str(text_file), "--window", "32", "--limit", "6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: rows depend on it
    killed = 0
    for place in ("predictions/*/*.safetensors", "rows/float.json", "models/*/.quantine/parts/*"):
        command = [sys.executable, "-m", "quantine.cli", *arguments]
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None and not any(out.glob(place)):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 2
    assert cli.main(arguments) == 0
    found = json.loads((out / "comparison.json").read_text())
    expected = compare(
        tiny("opt"),
        plans_of(POINTS[:2]),
        tmp_path / "whole",
        short,
        Measured((str(text_file),), 32, 6),
    )
    for one, other in zip(found["rows"], expected, strict=True):
        for key in ("name", "plan", "bits_per_weight", "model_bytes", "outlier_share"):
            assert one[key] == other[key]
        text = {**one["texts"]["text.txt"], "seconds": 0}
        assert text == pytest.approx({**other["texts"]["text.txt"], "seconds": 0})
    with (out / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == [row["name"] for row in expected]
    assert float(lines[1]["bits_per_weight"]) == expected[1]["bits_per_weight"]
    assert (out / "comparison.md").read_text() == markdown(found["rows"])
    assert (out / "pareto.svg").read_text().startswith("<?xml")
