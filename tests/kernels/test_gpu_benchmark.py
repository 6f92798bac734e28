"""`make gpu` where there is no GPU, and the parts of it that need none."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantine.kernels.matrix.units.unit_matrix import unit_matrix
from quantine.runtime.generate import ModuleDecoder
from quantine.runtime.graph_decoder import StaticDecoder
from quantine.runtime.packed import packed_modules

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
gpu_tokens: Any = importlib.import_module("gpu_tokens")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_it_says_what_it_would_do() -> None:
    found = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py")], capture_output=True, text=True, check=True
    )
    assert "There is no GPU here" in found.stdout
    assert "gpu-NAME.json" in found.stdout


def test_matrices_of_any_height_are_made_of_a_few_rows() -> None:
    code = (
        "import dataclasses, torch, gpu\n"
        "for kind in gpu.KINDS:\n"
        "    part = gpu.qtensor_of(dataclasses.replace(kind, columns=128))\n"
        "    whole = gpu.repeated(part, 3)\n"
        "    assert torch.equal(whole.dequantize(), part.dequantize().repeat(3, 1))\n"
    )
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])}
    subprocess.run([sys.executable, "-c", code], env=surroundings, check=True)


@pytest.mark.parametrize("kind", ["bfloat16", *gpu_tokens.KINDS])
def test_models_of_any_shape_decode_by_the_step_that_is_recorded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, few in {"PROMPT": 5, "TOKENS": 2, "RUNS": 2}.items():
        monkeypatch.setattr(gpu_tokens, name, few)
    torch.manual_seed(0)
    shape = gpu_tokens.Shape(128, 256, 1, 4, 2, 50)
    model = gpu_tokens.model_of(shape, gpu_tokens.KINDS.get(kind), "cpu")
    packed = [module for _, module in packed_modules(model)]
    assert len(packed) == (0 if kind == "bfloat16" else 7)
    made = []

    def make(model: Any, room: int) -> StaticDecoder:
        made.append(StaticDecoder(model, room, lambda step: step))
        return made[0]

    assert gpu_tokens.speed_of(model, make) > 0
    assert made[0].position == made[0].capacity == 7
    assert all(unit_matrix(module.qtensor()) is not None for module in packed)
    tokens = torch.arange(5) % 97 + 3
    made[0].reset()
    expected = ModuleDecoder(model).append(tokens)
    assert bool(expected.isfinite().all())
    torch.testing.assert_close(made[0].append(tokens), expected, rtol=2e-2, atol=2e-2)
