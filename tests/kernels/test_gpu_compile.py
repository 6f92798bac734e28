"""What NVIDIA's compiler makes of the programs; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_compile.py"
KEPT = ROOT / "benchmarks" / "results" / "compiled.json"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    # In a process of its own: this one interprets the programs.
    path = tmp_path_factory.mktemp("compiled") / "outcomes.json"
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--capability", "9.0", "--json", str(path)]
    subprocess.run(command, env=surroundings, check=True, capture_output=True)
    found: list[dict[str, Any]] = json.loads(path.read_text())["programs"]
    return found


def test_the_table_of_the_documentation_is_of_these_programs(
    outcomes: list[dict[str, Any]],
) -> None:
    kept = json.loads(KEPT.read_text())
    if kept["triton"] != version("triton"):
        pytest.skip(f"the table is of Triton {kept['triton']}")
    again = "run gpu_compile.py --json benchmarks/results/compiled.json, then gpu_page.py"
    assert [row for row in kept["programs"] if row["capability"] == "9.0"] == outcomes, again
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert all(f"| {row['name']} | {row['warps']} |" in page for row in outcomes), again


def test_nothing_is_spilled(outcomes: list[dict[str, Any]]) -> None:
    assert outcomes
    assert all(o["spilled"] == 0 and o["local"] == 0 for o in outcomes)


def test_activations_are_arranged_16_bytes_at_a_time(outcomes: list[dict[str, Any]]) -> None:
    found = [o for o in outcomes if o["name"].startswith("arranging")]
    assert found
    assert all(o["wide_loads"] == o["loads"] > 0 for o in found)


def test_codes_and_activations_are_read_16_bytes_at_a_time(outcomes: list[dict[str, Any]]) -> None:
    for o in outcomes:
        if o["name"].endswith(" 1 row") and not o["name"].startswith("arranging"):
            # A word of the codes of each of two rows at least, and 16 words of activations.
            assert o["wide_loads"] >= 2 * 3 + 16, o["name"]


def test_one_warp_never_waits(outcomes: list[dict[str, Any]]) -> None:
    alone = [o for o in outcomes if o["warps"] == 1 and "inputs; 4096 inputs, 1 row" in o["name"]]
    assert len(alone) >= 4
    assert all(o["barriers"] == 0 for o in alone)


def test_many_rows_take_tensor_cores(outcomes: list[dict[str, Any]]) -> None:
    rows = [o for o in outcomes if o["name"].endswith((" 16 rows", " 64 rows"))]
    many = [o for o in rows if not o["name"].startswith("arranging")]
    assert many
    assert all(o["tensor_core"] > 0 for o in many)


def test_integers_are_multiplied_four_bytes_at_a_time(outcomes: list[dict[str, Any]]) -> None:
    integers = [o for o in outcomes if o["name"].startswith("integers")]
    few = [o for o in integers if o["name"].endswith((" 1 token", " 4 tokens"))]
    many = [o for o in integers if o not in few]
    assert few
    assert many
    assert all(o["tensor_core"] == 0 and o["byte_products"] >= 64 for o in few)
    assert all(o["tensor_core"] > 0 and o["byte_products"] > 0 for o in many)
    # A word of the codes of each of two rows at least, and eight words of activations.
    assert all(o["wide_loads"] >= 2 * 3 + 8 for o in few)


@pytest.mark.parametrize(("bits", "most"), [(3, 18), (4, 10), (8, 1)])
def test_bytes_are_taken_out_by_few_instructions(
    bits: int, most: int, outcomes: list[dict[str, Any]]
) -> None:
    name = f"integers, {bits} bits, groups of 128 inputs; 4096 inputs, 1 token"
    (found,) = [o for o in outcomes if o["name"] == name]
    units = found["byte_products"] / 8
    assert units == 16  # of a thread: four of each of four rows
    assert found["logic"] <= most * units


def test_a_row_is_read_once_before_it_is_rounded(outcomes: list[dict[str, Any]]) -> None:
    alone = [o for o in outcomes if o["name"].startswith("rounding;")]
    wide = {o["name"]: o["wide_loads"] for o in alone}
    # A thread has 32 channels, which it gathers: their places are read 16 bytes at a time, in rows
    # of up to 16384 places once.
    assert wide == {
        "rounding; 4096 inputs, 1 token": 8,
        "rounding; 14336 inputs, 1 token": 8,
        "rounding; 28672 inputs, 1 token": 16,
    }


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


def test_a_column_loop_waits_for_no_other_warp_in_narrow_groups(
    outcomes: list[dict[str, Any]],
) -> None:
    loops = {o["name"]: o for o in outcomes if o["name"].startswith("column loop")}
    alone = [o for o in loops.values() if o["warps"] == 1]
    assert len(alone) >= 5
    # The one barrier lets the next part of a block see the errors of this one.
    assert all(o["barriers"] == 1 for o in alone)
    assert any("second grids of 64 rows" in o["name"] for o in alone)
    assert all(o["registers"] < 255 for o in loops.values())
