"""What NVIDIA's compiler makes of the programs; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_compile.py"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    # In a process of its own: this one interprets the programs.
    path = tmp_path_factory.mktemp("compiled") / "outcomes.json"
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--capability", "9.0", "--json", str(path)]
    subprocess.run(command, env=surroundings, check=True, capture_output=True)
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def test_nothing_is_spilled(outcomes: list[dict[str, Any]]) -> None:
    assert outcomes
    assert all(o["spilled"] == 0 and o["local"] == 0 for o in outcomes)


def test_codes_and_activations_are_read_16_bytes_at_a_time(outcomes: list[dict[str, Any]]) -> None:
    for o in outcomes:
        if o["name"].endswith(" 1 row"):
            # A word of the codes of each of two rows at least, and 16 words of activations.
            assert o["wide_loads"] >= 2 * 3 + 16, o["name"]


def test_one_warp_never_waits(outcomes: list[dict[str, Any]]) -> None:
    alone = [o for o in outcomes if o["warps"] == 1 and "inputs; 4096 inputs, 1 row" in o["name"]]
    assert len(alone) >= 4
    assert all(o["barriers"] == 0 for o in alone)


def test_many_rows_take_tensor_cores(outcomes: list[dict[str, Any]]) -> None:
    many = [o for o in outcomes if o["name"].endswith((" 16 rows", " 64 rows"))]
    assert many
    assert all(o["tensor_core"] > 0 for o in many)


def test_packed_context_is_read_16_bytes_at_a_time(outcomes: list[dict[str, Any]]) -> None:
    wholes = [o for o in outcomes if o["name"].startswith("attention, 4 bits")]
    assert len(wholes) >= 4
    # Keys and values, of the first turn and of those after it; and queries, masks, outputs.
    assert all(o["wide_loads"] >= 4 for o in wholes)


def test_attention_takes_tensor_cores(outcomes: list[dict[str, Any]]) -> None:
    found = [o for o in outcomes if o["name"].startswith("attention")]
    assert found
    assert all(o["tensor_core"] > 0 for o in found)


def test_one_warp_rounds_a_head_and_never_waits(outcomes: list[dict[str, Any]]) -> None:
    found = [o for o in outcomes if o["name"].startswith("rounding of keys")]
    assert found
    assert all(o["barriers"] == 0 for o in found)
