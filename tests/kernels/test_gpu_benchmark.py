"""`make gpu` where there is no GPU, and the parts of it that need none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_it_says_what_it_would_do() -> None:
    found = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py")], capture_output=True, text=True, check=True
    )
    assert "There is no GPU here" in found.stdout
    assert "gpu-NAME.json" in found.stdout
    assert "by rtn, gptq, spqr" in found.stdout


def test_matrices_of_any_height_are_made_of_a_few_rows() -> None:
    code = (
        "import dataclasses, os, torch, gpu\n"
        "assert os.environ['TRITON_INTERPRET'] == '0'  # or tests would not run on the GPU\n"
        "for kind in gpu.KINDS:\n"
        "    part = gpu.qtensor_of(dataclasses.replace(kind, columns=128))\n"
        "    whole = gpu.repeated(part, 3)\n"
        "    assert torch.equal(whole.dequantize(), part.dequantize().repeat(3, 1))\n"
    )
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])}
    subprocess.run([sys.executable, "-c", code], env=surroundings, check=True)


def test_quantizing_is_timed_and_compared_with_the_cpu(tmp_path: Path) -> None:
    # Little sizes, and the CPU in the place of a GPU, so both must find the same.
    code = (
        "from pathlib import Path\n"
        "import gpu_quantizing as quantizing\n"
        "from quantine import Calibration\n"
        "shape, calibration = quantizing.Shape(64, 128, 4, 2), Calibration(samples=2, seqlen=32)\n"
        "rows = quantizing.solved_matrices(shape, 'cpu', 200, 16)\n"
        "assert len(rows) == 12\n"
        "assert all(0 < row['error'] == row['error_of_cpu'] < 0.02 for row in rows)\n"
        "scratch = [Path(name) for name in ('one', 'other')]\n"
        "for path in scratch: path.mkdir()\n"
        "rows = quantizing.solved_block(shape, 'cpu', calibration, scratch[0])\n"
        "assert all(len(row['seconds_of_layers']) == 7 for row in rows)\n"
        "rows = quantizing.solved_model('one/block', 'cpu', calibration, 32, scratch[1])\n"
        "assert [row['method'] for row in rows] == ['rtn', 'gptq', 'spqr']\n"
        "assert all(row['perplexity'] == row['perplexity_of_cpu'] for row in rows)\n"
    )
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])}
    subprocess.run([sys.executable, "-c", code], env=surroundings, check=True, cwd=tmp_path)


def test_the_documentation_has_the_predicted_tables() -> None:
    found = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_predictions.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    page = (BENCHMARKS.parent / "docs" / "gpu.md").read_text()
    rows = [line for line in found.stdout.splitlines() if line.startswith("|")]
    assert sum("fits of groups" in row for row in rows) == 2
    assert all(row in page for row in rows)
