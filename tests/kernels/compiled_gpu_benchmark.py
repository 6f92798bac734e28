"""The parts of `make gpu` and its page that need no GPU, where Triton compiles.

test_gpu_benchmark.py runs this file in one process of its own: elsewhere in the suite Triton
interprets, and no process can do both.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantine import Calibration

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
gpu: Any = importlib.import_module("gpu")
gpu_page: Any = importlib.import_module("gpu_page")
gpu_plans: Any = importlib.import_module("gpu_plans")
gpu_predictions: Any = importlib.import_module("gpu_predictions")
gpu_products: Any = importlib.import_module("gpu_products")
quantizing: Any = importlib.import_module("gpu_quantizing")
roofline: Any = importlib.import_module("roofline")
allowance: Any = importlib.import_module("allowance")


def test_matrices_of_any_height_are_made_of_a_few_rows() -> None:
    for kind in gpu_products.KINDS:
        part = gpu_products.qtensor_of(replace(kind, columns=128))
        whole = gpu_products.repeated(part, 3)
        assert torch.equal(whole.dequantize(), part.dequantize().repeat(3, 1))


def test_the_page_has_the_predictions_that_the_bytes_of_today_give() -> None:
    page = gpu_page.PAGE.read_text()
    for written in (gpu_page.predictions, gpu_page.several, gpu_page.others, gpu_page.attentions):
        assert f"\n{written()}\n" in page


def test_predictions_count_all_instructions_that_were_compiled() -> None:
    known = roofline.compiled()
    kind = roofline.Product(3, 16, "in", 4096, True, True, 1)
    row = known[kind.name, "9.0"]
    units = 512 * 4096 / 32
    (work,) = roofline.packed(kind, 512, "9.0", known)
    assert work.instructions == units * row["instructions"] / row["units"]
    assert work.instructions > 2 * units * 55  # which take codes out and multiply them
    # Codes are taken out once for all rows, which are multiplied one by one.
    (four,) = roofline.packed(replace(kind, batch=4), 512, "9.0", known)
    assert 1.5 * work.instructions < four.instructions < 2.5 * work.instructions
    assert four.half > 2.4 * work.half
    assert four.integer < 1.25 * work.integer
    assert four.nbytes < 1.1 * work.nbytes
    # A row of 448 units has a thread for each four of 512; a length not compiled takes others'.
    longer = replace(kind, columns=14336, outliers=False)
    (work,) = roofline.packed(longer, 512, "9.0", known)
    row = known[replace(longer, columns=4096).name, "9.0"]
    assert (longer.name, "9.0") not in known
    assert work.instructions == 512 * 512 * row["instructions"] / row["units"]
    # Tiles take codes out once for 64 rows; for many the matrix is written, and read as floats.
    tiles = roofline.packed(replace(kind, batch=16), 512, "9.0", known)
    assert len(tiles) == 1
    assert tiles[0].operations == 2 * 512 * 4096 * 16
    decoding, floats = roofline.packed(replace(kind, batch=256), 512, "9.0", known)
    assert min(decoding.nbytes, floats.nbytes) > 2 * 512 * 4096


def test_least_seconds_are_those_of_what_takes_longest() -> None:
    card = roofline.Gpu("a card", 1000, 100, 1, 1, 64, 64, 200, "9.0")
    assert roofline.seconds([roofline.Work(5000, 128)], card) == 5
    assert roofline.seconds([roofline.Work(5000, 1280)], card) == 10
    assert roofline.seconds([roofline.Work(5000, 1280, integer=1280)], card) == 20
    assert roofline.seconds([roofline.Work(1000, byte_operations=600)], card) == 3
    assert roofline.seconds([roofline.Work(1000), roofline.Work(0, operations=700)], card) == 8


def test_the_page_has_the_memory_that_plans_predict() -> None:
    assert gpu_page.table(gpu_plans.head(), gpu_plans.rows()) in gpu_page.PAGE.read_text()


def test_the_page_has_the_tables_of_quantizing() -> None:
    rows = [line for line in gpu_predictions.page().splitlines() if line.startswith("|")]
    assert sum("fits of groups" in row for row in rows) == 4
    page = gpu_page.PAGE.read_text()
    assert all(row in page for row in rows)


def test_what_was_measured_becomes_a_table() -> None:
    row = {
        "kind": "4 bits",
        "outputs": 4096,
        "microseconds": 4.6,
        "float16_microseconds": 13.2,
        "times_float16": 2.87,
        "gigabytes_per_second": 1900.0,
    }
    outcome = {
        "device": "a card",
        "torch": "2.13",
        "products": [row],
        "attention": [row | {"context": 32768}],
        "tokens": [],
        "gigabytes_per_second_copied": 4400.0,
        "left_out": {"tokens": ["3 bits", "4 bits"]},
    }
    text = gpu_page.measured(outcome)
    assert "| 4 bits | 4096 | 4.6 | 13.2 | 2.87 | 1900.0 |" in text
    assert "| 13.2 | 2.87 | 1900.0 | 32768 |" in text
    assert "a card, PyTorch 2.13; its memory copies 4400.0 GB/s." in text
    assert "Left out of tokens for want of time: 3 bits; 4 bits." in text


def test_quantizing_is_timed_and_compared_with_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Little sizes, and the CPU in the place of a GPU, so both must find the same.
    monkeypatch.chdir(tmp_path)
    shape, calibration = quantizing.Shape(64, 128, 4, 2), Calibration(samples=2, seqlen=32)
    time = allowance.Allowance(float("inf"))
    rows = quantizing.solved_matrices(shape, "cpu", 200, 16, time)
    assert len(rows) == 12
    assert all(0 < row["error"] == row["error_of_cpu"] < 0.02 for row in rows)
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    rows = quantizing.solved_block(shape, "cpu", calibration, one, time)
    assert all(len(row["seconds_of_layers"]) == 7 for row in rows)
    rows = quantizing.solved_model(str(one / "block"), "cpu", calibration, 32, other, time)
    assert [row["method"] for row in rows] == ["rtn", "gptq", "spqr"]
    assert all(row["perplexity"] == row["perplexity_of_cpu"] for row in rows)
    assert time.failed == []


@pytest.mark.parametrize(("bits", "fails"), [(4, False), (3, True)])
def test_a_worse_error_than_the_cpus_is_a_failure(
    bits: int, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver, spec = quantizing.SOLVERS["rtn"]
    asked = itertools.count()

    def on_a_device(weight: Any, hessian: Any, spec: Any) -> Any:
        # Of each matrix the device is asked first, then the CPU, then the device for its seconds.
        first = next(asked) % 3 == 0
        return solver(weight, hessian, replace(spec, bits=bits) if first else spec)

    monkeypatch.setattr(quantizing, "SOLVERS", {"rtn": (on_a_device, spec)})
    time = allowance.Allowance(float("inf"))
    rows = quantizing.solved_matrices(quantizing.Shape(64, 128, 4, 2), "cpu", 200, 16, time)
    assert len(rows) == 4
    named = [said.partition(":")[0] for said in time.failed]
    assert named == ([f"matrix {row['matrix']}, rtn" for row in rows] if fails else [])


@pytest.mark.parametrize("ratio", [1.01, 0.97, 1.03, float("nan")])
def test_another_perplexity_than_the_cpus_is_a_failure(
    ratio: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def perplexity(out: Path, **_: Any) -> dict[str, Any]:
        return {"texts": {"a text": {"perplexity": 8.0 * (1 if "_of_cpu" in out.name else ratio)}}}

    monkeypatch.setattr(quantizing, "quantize", lambda *_, **named: named)
    monkeypatch.setattr(quantizing, "evaluate", perplexity)
    monkeypatch.setattr(quantizing, "SOLVERS", {"rtn": None})
    time = allowance.Allowance(float("inf"))
    (row,) = quantizing.solved_model("a model", "cpu", Calibration(), 32, tmp_path, time)
    assert row["perplexity_of_cpu"] == 8.0
    assert [said.partition(":")[0] for said in time.failed] == (
        [] if ratio == 1.01 else ["model a model, rtn"]
    )


def test_a_result_that_is_wrong_makes_the_whole_command_fail(tmp_path: Path) -> None:
    def compared(allowed: Any) -> list[dict[str, float]]:
        allowed.demand(True, "right")
        allowed.demand(False, "a product: off by 0.3 of the largest output")
        return [{"microseconds": 4.6}]

    path = tmp_path / "found.json"
    assert not gpu.carried_out({"products": gpu.Part("compare", 9, compared)}, {}, path)
    found = json.loads(path.read_text())
    assert found["products"] == [{"microseconds": 4.6}]
    assert found["failed"] == {"products": ["a product: off by 0.3 of the largest output"]}
    text = gpu_page.measured({"device": "a card", "torch": "2.13"} | found)
    assert "Failed of products: a product: off by 0.3 of the largest output." in text


def test_what_was_found_is_kept_whatever_fails_after_it(tmp_path: Path) -> None:
    # A second passes whenever the clock is read; each part says whether it was allowed two things.
    def fail(_: Any) -> None:
        raise RuntimeError("no such program")

    def two(allowed: Any) -> list[bool]:
        return [allowed.allows(name) for name in ("first", "second")]

    asked = {
        "one": gpu.Part("say one", 3.5, two),
        "two": gpu.Part("fail", 0, fail),
        "three": gpu.Part("say three", 5, two),
        "four": gpu.Part("late", 0.5, two),
    }
    path, clock = tmp_path / "found.json", itertools.count().__next__
    assert not gpu.carried_out(asked, {"device": "a card"}, path, clock)
    found = json.loads(path.read_text())
    assert found.pop("seconds") == {"one": 3, "two": 1, "three": 3, "four": 3}
    assert found == {
        "device": "a card",
        "one": [True, True],
        "two": "failed: no such program",
        "three": [True, False],
        "four": [False, False],
        "left_out": {"three": ["second"], "four": ["first", "second"]},
        "failed": {},
    }
    assert gpu.carried_out({"one": asked["one"]}, {}, path)


def test_each_part_that_is_said_can_be_done() -> None:
    parts = gpu.parts(None)
    assert list(parts) == list(gpu.PARTS)
    assert all(callable(part.do) for part in parts.values())


def test_the_tests_of_all_programs_run_on_the_gpu() -> None:
    files = (gpu.ROOT / "tests" / "kernels").glob("test_triton_*.py")
    assert {f"tests/kernels/{file.name}" for file in files} <= set(gpu.TESTS)
    assert all((gpu.ROOT / name).exists() for name in gpu.TESTS)


def test_tests_that_begin_when_no_time_is_left_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_first(): time.sleep(0.6)\ndef test_second(): assert False\n"
    )
    monkeypatch.setattr(gpu, "TESTS", ("test_slow.py",))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    left = allowance.Allowance(time.monotonic() + 0.5)
    found = gpu.tested(left)
    assert found["pytest"].startswith("1 passed, 1 skipped"), found
    assert left.left_out == ["test_slow.py::test_second"]
