"""What `quantine bench` measures; how large the numbers are is no matter of tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from other_device import NAME, OtherDevice
from quantine import Calibration, load, quantize
from quantine.cli import main
from quantine.core.device import CPU
from quantine.errors import BackendUnavailable, PlanError
from quantine.eval import device_speed, speed
from quantine.kernels import backend
from quantine.kernels.matrix import product
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix
from quantine.report.tables.console import make_console
from quantine.report.tables.speeds import print_speeds
from quantine.run.target_plan import target_plan
from quantine.runtime.packed import packed_modules

Packed = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "READ_BYTES", 2**20)
    monkeypatch.setattr(speed, "WORK_BYTES", 2**13)


def test_everything_is_measured_and_counted(
    packed: Packed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, path = packed("llama", "spqr"), tmp_path / "speed.json"
    arguments = ["bench", str(out), "--against", "bfloat16", "--context", "5", "9999"]
    assert main([*arguments, "--runs", "2", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    report = json.loads((out / "quantine_report.json").read_text())
    assert sum(kind["matrices"] for kind in found["kernels"]) == len(report["layers"])
    by_name = {layer["name"]: layer for layer in report["layers"]}
    for kind in found["kernels"]:
        layer = by_name[kind["name"]]
        assert kind["shape"] == layer["shape"]
        assert kind["bits_per_weight"] == pytest.approx(layer["bits_per_weight"])
        for arithmetic in ("exact", "fast"):
            timed = kind[arithmetic]
            assert 0 < timed["low"] <= timed["median"] <= timed["high"]
            assert timed["share"] == pytest.approx(timed["median"] / found["read"]["median"])
    names = {row["name"] for row in found["text"]}
    assert names == {"modules", "native exact", "native fast", "transformers bfloat16"}
    contexts = {row["context"] for row in found["text"]}
    assert min(contexts) == 5
    assert max(contexts) < 9999  # cut to what the model allows
    assert all(row["decode"]["median"] > 0 < row["prefill"]["median"] for row in found["text"])
    assert "decode tokens/s" in capsys.readouterr().out


def test_the_time_of_a_token_is_broken_down(
    packed: Packed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, path = packed("llama", "spqr"), tmp_path / "stages.json"
    arguments = ["bench", str(out), "--breakdown", "--context", "9", "--runs", "1"]
    assert main([*arguments, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert all(stage["microseconds"] > 0 for stage in stages.values())
    named = sum(stage["microseconds"] for stage in stages.values())
    assert named + found["outside"] == pytest.approx(found["token"]["median"])
    model = load(out, dtype=torch.float32)[0]
    matrices = {name: module.matrix().nbytes for name, module in packed_modules(model)}
    assert stages["down"]["bytes"] == sum(n for name, n in matrices.items() if "down" in name)
    assert stages["norms"]["bytes"] == 0 < stages["attention"]["bytes"] < stages["head"]["bytes"]
    printed = capsys.readouterr().out
    assert "gate and up" in printed
    assert "parallel steps" in printed
    assert main([*arguments, "--against", "bfloat16"]) != 0
    assert "leave out --against" in capsys.readouterr().err


def test_another_model_takes_turns(packed: Packed, tiny: Callable[[str], Path]) -> None:
    other = str(tiny("llama"))
    found = speed.measure(packed("llama", "rtn"), against=other, contexts=(4,), runs=1)
    assert f"{other}, native exact" in {row["name"] for row in found["text"]}


def test_models_without_a_native_decoder_run_as_modules(packed: Packed) -> None:
    found = speed.measure(packed("opt_projected", "rtn"), contexts=(4,), runs=1)
    assert {row["name"] for row in found["text"]} == {"modules"}


def test_matrices_without_native_products_are_no_kernels(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, path = target_plan(tiny("llama"), "llama.cpp:Q4_1", method="rtn"), tmp_path / "speed.json"
    out = quantize(tiny("llama"), tmp_path / "out", plan, Calibration(samples=0)).path
    measured = ["bench", str(out), "--context", "4", "--runs", "1", "--json", str(path)]
    assert main(measured) == 0
    assert "decoded at each use" in capsys.readouterr().out
    found = json.loads(path.read_text())
    report = json.loads((out / "quantine_report.json").read_text())
    plain = sum(kind["matrices"] for kind in found["kernels"])
    decoded = sum(kind["matrices"] for kind in found["decoded"])
    assert decoded >= 14  # of blocks; others may have types that kernels read
    assert plain + decoded == len(report["layers"])
    assert all(kind["speed"]["median"] > 0 for kind in found["decoded"])
    assert {row["name"] for row in found["text"]} == {"modules"}


def test_refusals(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    out = packed("llama", "rtn")
    for arguments in ({"runs": 0}, {"contexts": ()}, {"contexts": (0,)}):
        with pytest.raises(PlanError, match="must be positive"):
            speed.measure(out, **arguments)
    monkeypatch.setattr(backend, "native", lambda: None)
    with pytest.raises(BackendUnavailable, match="nothing to time"):
        speed.measure(out)


def test_a_device_that_is_not_there_is_refused_by_name(
    packed: Packed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(packed("llama", "rtn")), "--device", "nosuch"]) != 0
    assert "no device 'nosuch' here" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_cuda_is_refused_where_there_is_none(packed: Packed) -> None:
    with pytest.raises(BackendUnavailable, match="no device 'cuda' here"):
        speed.measure(packed("llama", "rtn"), device="cuda")


def test_another_device_is_timed_with_what_it_has(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_speed, "COPIED", 2**16)
    with OtherDevice():
        found = speed.measure(
            packed("llama", "rtn"), device=NAME, against="bfloat16", contexts=(4,), runs=2
        )
    assert found["device"] == f"{NAME}:0"
    assert found["read"]["median"] > 0
    assert found["kernels"] == []  # no programs for it
    assert {row["name"] for row in found["text"]} == {"modules", "transformers bfloat16"}
    print_speeds(found, make_console(quiet=True))


def test_products_of_a_gpu_go_through_more_than_its_cache(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    monkeypatch.setattr(backend, "of", lambda *_: "triton")
    model, _ = load(packed("llama", "rtn"))
    modules = [module for _, module in packed_modules(model)][:1]
    nbytes = device_speed.device_bytes(modules[0].matrix())
    monkeypatch.setattr(device_speed, "CACHED", 3 * nbytes)
    multiplied = []

    def look(matrix: UnitMatrix, x: Tensor, arithmetic: str) -> Tensor:
        multiplied.append(matrix)
        return product(matrix, x, "exact")

    monkeypatch.setattr(device_speed, "product", look)
    assert device_speed.product_speed(modules, CPU, lambda work: work() or 1e-3) == pytest.approx(
        3 * nbytes / 1e6
    )
    places = {matrix.words.data_ptr() for matrix in multiplied}
    assert len(multiplied) == len(places) == 3
    assert all(torch.equal(matrix.words, multiplied[0].words) for matrix in multiplied)


def test_a_copy_counts_what_is_read_and_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_speed, "COPIED", 2**16)
    assert device_speed.copy_speed(CPU, lambda work: 1e-3) == pytest.approx(2 * 2**16 / 1e6)
    assert device_speed.launched_seconds(CPU)(lambda: None) >= 0
