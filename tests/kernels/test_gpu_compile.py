"""What NVIDIA's compiler makes of the programs; no GPU is needed.

What it made of all programs is in a file; few are compiled here. Triton's own hash of what it
compiles tells whether the file is of the programs as they are.
"""

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
BENCHMARKS = ROOT / "benchmarks"
KEPT = BENCHMARKS / "results" / "compiled.json"
AGAIN = "run gpu_compile.py --json benchmarks/results/compiled.json, then gpu_page.py"
CAPABILITIES = {"8.0", "8.9", "9.0", "10.0"}
COMPILED = (
    "3 bits, groups of 16 inputs, SpQR's statistics, 1% outliers; 4096 inputs, 1 row",
    "4 bits, groups of 128 inputs; 4096 inputs, 16 rows",
    "integers, 4 bits, groups of 128 inputs; 4096 inputs, 1 token",
    "attention, 4 bits; 128 channels, 4 heads to one, 1 token",
    "column loop, 4 bits, known grids",
)
"""Programs that are compiled here."""
FEW_ROWS = (" 1 row", " 2 rows", " 3 rows", " 4 rows")
MOST_INSTRUCTIONS = 55
"""For 32 codes of 3 or 4 bits: what docs/gpu.md says of them."""
SHARED_MEMORY = 99 * 1024
"""Bytes that a program may take of GPUs of capability 8.6 and 8.9."""
FEW_TOKENS = (" 1 token", " 2 tokens", " 3 tokens", " 4 tokens")
"""How names of programs for few rows of integers end."""


@pytest.fixture(scope="module")
def everywhere() -> list[dict[str, Any]]:
    """What the file has of all programs, for every capability."""
    kept = json.loads(KEPT.read_text())
    if kept["triton"] != version("triton"):
        pytest.skip(f"the table is of Triton {kept['triton']}")
    found: list[dict[str, Any]] = kept["programs"]
    return found


@pytest.fixture(scope="module")
def outcomes(everywhere: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in everywhere if row["capability"] == "9.0"]


def run(*arguments: str) -> str:
    # In a process of its own: this one interprets the programs.
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=surroundings, check=True, capture_output=True, text=True, cwd=BENCHMARKS
    ).stdout


def test_the_table_is_of_the_programs_as_they_are(everywhere: list[dict[str, Any]]) -> None:
    code = (
        "import json, gpu_compile as g\n"
        "print(json.dumps({p.name: g.asked(p).key for p in g.PROGRAMS}))"
    )
    keys = json.loads(run("-c", code))
    found = {row["name"]: row["key"] for row in everywhere}
    assert found == keys, AGAIN
    assert len(everywhere) == len(keys) * len(CAPABILITIES)
    assert {row["capability"] for row in everywhere} == CAPABILITIES
    page = (ROOT / "docs" / "gpu.md").read_text()
    shown = [row for row in everywhere if row["capability"] == "9.0"]
    assert all(f"| {row['name']} | {row['warps']} |" in page for row in shown), AGAIN


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the installed Triton makes of some programs, whatever its version."""
    path = tmp_path_factory.mktemp("compiled") / "outcomes.json"
    run("gpu_compile.py", "--capability", "9.0", "--json", str(path), "--only", *COMPILED)
    found: list[dict[str, Any]] = json.loads(path.read_text())["programs"]
    assert len(found) == len(COMPILED)
    return found


def test_the_compiler_says_it_again(
    here: list[dict[str, Any]], outcomes: list[dict[str, Any]]
) -> None:
    assert here == [row for row in outcomes if row["name"] in COMPILED], AGAIN


def test_any_compiler_leaves_everything_in_registers(here: list[dict[str, Any]]) -> None:
    assert [o for o in here if o["spilled"] or o["local"]] == []
    few = [o for o in here if o["units"]]
    assert few
    assert [o for o in few if o["warps"] == 1 and o["barriers"]] == []
    assert all(o["wide_code_loads"] == o["code_loads"] > 0 for o in few)
    assert all(o["wide_loads"] - o["wide_code_loads"] >= 16 for o in few)


def test_nothing_is_spilled(everywhere: list[dict[str, Any]]) -> None:
    assert everywhere
    assert [o for o in everywhere if o["spilled"] or o["local"]] == []


def test_all_kinds_that_are_timed_are_compiled(outcomes: list[dict[str, Any]]) -> None:
    names = {o["name"] for o in outcomes}
    for bits in (3, 4, 5, 8):
        for along in ("inputs", "outputs"):
            for groups in (f"128 {along}", f"16 {along}, SpQR's statistics"):
                for outliers in ("", ", 1% outliers"):
                    kind = f"{bits} bits, groups of {groups}{outliers}"
                    assert f"{kind}; 4096 inputs, 1 row" in names


def test_activations_are_arranged_16_bytes_at_a_time(outcomes: list[dict[str, Any]]) -> None:
    found = [o for o in outcomes if o["name"].startswith("arranging")]
    assert found
    assert all(o["wide_loads"] == o["loads"] > 0 for o in found)


def test_activations_are_read_16_bytes_at_a_time(everywhere: list[dict[str, Any]]) -> None:
    rows = [o for o in everywhere if o["units"]]
    assert rows
    for o in rows:
        # All 16 words of a unit of each row, those of scales along outputs, beside those of codes.
        words = 16 * (batch_of(o) + ("outputs" in o["name"]))
        assert o["wide_loads"] - o["wide_code_loads"] >= words, o["name"]


def batch_of(row: dict[str, Any]) -> int:
    """Rows of activations of a program for few."""
    return int(row["name"].split(" ")[-2])


def test_all_widths_are_compiled_along_both_axes(outcomes: list[dict[str, Any]]) -> None:
    names = [o["name"] for o in outcomes if o["name"].endswith(" 1 row")]
    for bits in range(2, 9):
        for axis in ("inputs", "outputs"):
            mine = [name for name in names if name.startswith(f"{bits} bits, groups of ")]
            assert any(f" {axis}" in name.partition(";")[0] for name in mine), (bits, axis)


def test_one_warp_never_waits(everywhere: list[dict[str, Any]]) -> None:
    few = [o for o in everywhere if o["units"]]
    few += [o for o in everywhere if o["name"].startswith("integers")]
    few = [o for o in few if o["name"].endswith(FEW_TOKENS + FEW_ROWS)]
    alone = [o for o in few if o["warps"] == 1]
    assert all(o["warps"] == 1 for o in few if o["units"] and "; 4096 inputs" in o["name"])
    # All kinds with one row, some with two to four, and the integers'.
    assert len(alone) >= (33 + 4 + 6) * len(CAPABILITIES)
    assert [o for o in alone if o["barriers"]] == []


def test_codes_are_read_16_bytes_at_a_time(everywhere: list[dict[str, Any]]) -> None:
    few = [o for o in everywhere if o["units"]]
    decoding = [o for o in everywhere if o["name"].startswith("decoding")]
    tiles = [o for o in everywhere if o["name"].endswith(" 16 rows") and "outputs" not in o["name"]]
    integers = [o for o in everywhere if o["name"].startswith("integers")]
    integers = [o for o in integers if o["name"].endswith(FEW_TOKENS)]
    for kind in (few, decoding, tiles, integers):
        assert kind
        assert all(o["wide_code_loads"] == o["code_loads"] > 0 for o in kind)


def test_32_codes_take_55_instructions(everywhere: list[dict[str, Any]]) -> None:
    rows = [o for o in everywhere if o["units"] and o["name"].startswith(("3 bits", "4 bits"))]
    rows = [o for o in rows if o["name"].endswith(" 1 row")]
    assert {"inputs", "outputs"} == {o["name"].split(" ")[5].strip(";,") for o in rows}
    assert len(rows) >= 20 * len(CAPABILITIES)
    for o in rows:
        # What loads constants is there once, for fewer than the units of a thread.
        assert o["half"] // o["units"] == 32, o["name"]
        assert (o["half"] + o["integer"]) // o["units"] <= MOST_INSTRUCTIONS, o["name"]


def test_codes_are_decoded_once_for_several_rows(everywhere: list[dict[str, Any]]) -> None:
    rows = [o for o in everywhere if o["units"] and not o["name"].endswith(" 1 row")]
    assert len(rows) >= 12 * len(CAPABILITIES)
    once = {
        (o["name"][0], o["capability"]): o["integer"] / o["units"]
        for o in everywhere
        if o["units"] and o["name"].endswith(" 1 row")
    }
    for o in rows:
        batch = batch_of(o)
        # 16 centre codes, 16 multiply them with a row of activations. Along outputs two or four
        # rows of the matrix share the products of activations with scales, and with zero points.
        most = 16 * (1 + batch) + (16 * batch if "outputs" in o["name"] else 0)
        assert o["half"] / o["units"] <= most + 1, o["name"]
        # Some take the constants of a pair into registers.
        taken_out = once[o["name"][0], o["capability"]]
        assert o["integer"] / o["units"] <= 1.25 * taken_out, o["name"]


def test_every_program_fits_the_shared_memory_of_its_gpu(everywhere: list[dict[str, Any]]) -> None:
    # 8.0 of an A100 has more, but the same code runs on 8.6, which has as much as 8.9.
    small = [o for o in everywhere if o["capability"] in {"8.0", "8.9"}]
    assert small
    assert all(o["shared"] <= SHARED_MEMORY for o in small)


def test_many_rows_take_tensor_cores(outcomes: list[dict[str, Any]]) -> None:
    rows = [o for o in outcomes if o["name"].endswith((" 16 rows", " 64 rows"))]
    many = [o for o in rows if not o["name"].startswith("arranging")]
    assert many
    assert all(o["tensor_core"] > 0 for o in many)


def test_integers_are_multiplied_four_bytes_at_a_time(outcomes: list[dict[str, Any]]) -> None:
    integers = [o for o in outcomes if o["name"].startswith("integers")]
    few = [o for o in integers if o["name"].endswith(FEW_TOKENS)]
    many = [o for o in integers if o not in few]
    assert few
    assert many
    assert all(o["tensor_core"] == 0 and o["byte_products"] >= 64 for o in few)
    assert all(o["tensor_core"] > 0 and o["byte_products"] > 0 for o in many)
    # All eight words of activations, beside the words of codes.
    assert all(o["wide_loads"] - o["wide_code_loads"] >= 8 for o in few)


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
