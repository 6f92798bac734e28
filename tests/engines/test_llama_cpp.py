"""Exported GGUF files in the real llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engines.serving import interpreter, own_perplexity, run_engine, windows_of
from quantine import Calibration, Plan, quantize
from quantine.formats.export import export

pytestmark = [pytest.mark.engines, pytest.mark.slow]
TEXTS = ["Hello world 123, it's  fine.\n\n ok", "naïve 日本 2024!", "def f(x):\n\treturn x**2"]
SAME = 0.001
"""Largest relative difference of perplexities, where llama.cpp multiplies with decoded weights."""
ROUNDED = 0.01
"""The same where it multiplies with blocks: it then rounds activations to 8 bits."""
GRIDS: list[dict[str, Any]] = [
    {"bits": 2, "group_size": 64, "sym": True},
    {"bits": 3, "group_size": 32},
    {"bits": 4, "group_size": 64},
    {"bits": 4, "group_size": 64, "sym": True},
    {"bits": 5, "group_size": 64},
    {"bits": 8, "group_size": -1, "sym": True},
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "-".join(map(str, grid.values())))
def test_the_same_perplexity(grid: dict[str, Any], tmp_path: Path) -> None:
    python = interpreter("QUANTINE_LLAMA_CPP_PYTHON")
    plan = Plan.preset("rtn", clip="mse", **grid)
    out = quantize("demo", tmp_path / "out", plan, Calibration(samples=0)).path
    file = export(out, tmp_path / "gguf", "gguf").path / "model.gguf"
    windows = windows_of(out, 512, 24)
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps({"windows": windows, "texts": TEXTS}), encoding="utf-8")
    expected = own_perplexity(out, windows)
    decoded = run_engine(python, "llama_cpp_program.py", str(file), str(asked), "decoded")
    assert decoded["perplexity"] == pytest.approx(expected, rel=SAME)
    found = run_engine(python, "llama_cpp_program.py", str(file), str(asked))
    assert found["perplexity"] == pytest.approx(expected, rel=ROUNDED)


def test_the_same_tokens(tmp_path: Path) -> None:
    python = interpreter("QUANTINE_LLAMA_CPP_PYTHON")
    from quantine.source.locate import locate

    out = quantize("demo", tmp_path / "out", Plan.preset("rtn"), Calibration(samples=0)).path
    file = export(out, tmp_path / "gguf", "gguf").path / "model.gguf"
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps({"windows": [[1, 2, 3]], "texts": TEXTS}), encoding="utf-8")
    found = run_engine(python, "llama_cpp_program.py", str(file), str(asked))
    tokenizer = locate(out).tokenizer()
    assert found["texts"] == [tokenizer(t, add_special_tokens=False)["input_ids"] for t in TEXTS]
