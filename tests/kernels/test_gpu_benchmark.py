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


def test_matrices_of_any_height_are_made_of_a_few_rows() -> None:
    code = (
        "import dataclasses, torch, gpu\n"
        "for kind in gpu.KINDS:\n"
        "    part = gpu.qtensor_of(dataclasses.replace(kind, columns=128))\n"
        "    whole = gpu.repeated(part, 3)\n"
        "    assert torch.equal(whole.dequantize(), part.dequantize().repeat(3, 1))\n"
    )
    run(code)


def test_the_page_has_the_predictions_that_the_bytes_of_today_give() -> None:
    run("import gpu_page\nassert gpu_page.predictions() in gpu_page.PAGE.read_text()\n")


def test_the_page_has_the_memory_that_plans_predict() -> None:
    run(
        "import gpu_page, gpu_plans\n"
        "text = gpu_page.table(gpu_plans.head(), gpu_plans.rows())\n"
        "assert text in gpu_page.PAGE.read_text()\n"
    )


def test_what_was_measured_becomes_a_table() -> None:
    run(
        "import gpu_page\n"
        "row = dict(kind='4 bits', outputs=4096, microseconds=4.6, float16_microseconds=13.2,\n"
        "           times_float16=2.87, gigabytes_per_second=1900.0)\n"
        "text = gpu_page.measured(dict(device='a card', torch='2.13', products=[row]))\n"
        "assert '| 4 bits | 4096 | 4.6 | 13.2 | 2.87 | 1900.0 |' in text\n"
    )


def run(code: str) -> None:
    """Run ``code`` beside the benchmarks, in a process where Triton compiles."""
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])}
    subprocess.run([sys.executable, "-c", code], env=surroundings, check=True)
