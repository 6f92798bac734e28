"""The examples, on tiny models."""

from __future__ import annotations

import importlib.util
import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantine
from tiny_models import bits_equal, oracle_weights

EXAMPLES = Path(__file__).parent.parent / "examples"
Tiny = Callable[[str], Path]


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_notebook_quantizes_and_looks(tiny: Tiny, tmp_path: Path) -> None:
    cells = json.loads((EXAMPLES / "quantize_and_look.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") for cell in cells), "clear the outputs before a commit"
    changed = {"MODEL": str(tiny("llama")), "OUT": str(tmp_path / "out")}
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert changed.keys() <= names.keys()
            names |= changed
    assert names["errors"].keys() >= {"q_proj", "down_proj"}
    assert len(names["axes"].lines) == len(names["errors"]) == len(names["legend"].texts)
    assert math.isfinite(names["found"]["recovery"])
    assert names["tokens"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_quantizing_in_python(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "quantize_in_python.py", tiny("llama"), tmp_path / "out")
    said = capsys.readouterr().out
    assert "bits per quantized weight" in said
    assert "The capital of France is" in said


def test_exporting_to_llama_cpp(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, target = tmp_path / "out", tmp_path / "gguf"
    if importlib.util.find_spec("llama_cpp") is not None:
        pytest.skip("the tiny model is not llama.cpp's: tests/engines asks it")
    run(monkeypatch, "export_to_llama_cpp.py", tiny("llama"), out, target)
    said = capsys.readouterr().out
    assert f"llama-cli -m {target / 'model.gguf'}" in said
    from quantine.formats.imported import import_model

    back = import_model(target / "model.gguf", tmp_path / "back").path
    weights, expected = oracle_weights(back), oracle_weights(out)
    assert weights.keys() == expected.keys()
    assert all(bits_equal(weights[name], expected[name]) for name in weights)


def test_serving_with_vllm_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is here: tests/engines/vllm runs the example")
    with pytest.raises(SystemExit, match=r"vLLM is not here: install it .*docs/engines.md"):
        run(monkeypatch, "serve_with_vllm.py", "out")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_plans_are_plans(path: Path) -> None:
    assert quantine.Plan.from_file(path).name
