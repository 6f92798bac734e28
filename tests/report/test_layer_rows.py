"""The order of layers, and the rows that they share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantine import Calibration, Plan, cli, quantize
from quantine.report.layer_order import (
    block_and_path,
    name_in_every_block,
    natural_order,
    recorded_order,
)
from quantine.report.tables.inventory import inventory_rows, print_inventory
from quantine.report.tables.layer_rows import LayerRow, layer_rows
from quantine.report.tables.plan import plan_rows
from quantine.run.prepare import prepare

Tiny = Callable[[str], Path]
RUNNING = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
SCHEME = {"method": "rtn", "bits": 4, "group_size": 32, "sym": False, "format": "dense"}


def layer(name: str, **values: Any) -> dict[str, Any]:
    """An entry of an inventory's ``layers``."""
    plain = {"scheme": SCHEME, "shape": [8, 64], "bytes": 288, "bits_per_weight": 4.5}
    missing = dict.fromkeys(("output_error", "choice", "tokens", "tokens_borrowed"))
    return {"name": name, **plain, **missing, **values}


def choice(near: float, far: float, margin: float) -> dict[str, Any]:
    """A choice between two axes, with the losses of both."""
    schemes = [{**SCHEME, "group_axis": axis} for axis in ("in", "out")]
    losses = zip(schemes, (near, far), strict=True)
    return {"choices": [{**one, "loss": loss} for one, loss in losses], "margin": margin}


def inventory_of(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """What `quantine.formats.inventory.inventory` would say of ``layers``."""
    keys = ("quantized_weights", "bits_per_weight", "quantized_bytes")
    totals = dict.fromkeys((*keys, "kept_bytes", "header_bytes", "file_bytes"), 0)
    kernel = {"name": "reference", "why": "none"}
    return {
        "layers": layers,
        "kept": [],
        "arithmetic": "exact",
        "kernel": kernel,
        "totals": totals,
    }


def printed(
    layers: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], every_layer: bool = False
) -> list[list[str]]:
    """The cells of each line that is shown: cells are two blanks apart, or more."""
    print_inventory(inventory_of(layers), every_layer)
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


@pytest.mark.parametrize(
    ("name", "block", "path", "starred"),
    [
        ("model.layers.10.mlp.up_proj", 10, "mlp.up_proj", "model.layers.*.mlp.up_proj"),
        ("h.0.experts.1.fc", 0, "experts.1.fc", "h.*.experts.1.fc"),
        ("lm_head", None, "lm_head", "lm_head"),
        ("model.embed_tokens", None, "model.embed_tokens", "model.embed_tokens"),
    ],
)
def test_names_say_the_block(name: str, block: int | None, path: str, starred: str) -> None:
    assert block_and_path(name) == (block, path)
    assert name_in_every_block(name) == starred


def test_blocks_are_ordered_as_numbers_and_layers_as_they_run() -> None:
    running = [f"m.{block}.{path}" for block in range(12) for path in RUNNING]
    found = natural_order([{"name": name} for name in sorted([*running, "head"])], running)
    assert [one["name"] for one in found] == ["head", *running]


def test_without_a_recorded_order_layers_of_a_block_stay_as_they_are() -> None:
    names = ["m.10.b", "m.10.a", "m.2.b", "m.2.a", "m.1.a"]
    found = natural_order([{"name": name} for name in names])
    assert [one["name"] for one in found] == ["m.1.a", "m.2.b", "m.2.a", "m.10.b", "m.10.a"]


def test_layers_that_differ_only_by_block_share_a_row() -> None:
    layers = [("m.0.a", 3), ("m.0.b", 3), ("m.1.a", 4), ("m.1.b", 3), ("m.2.a", 3), ("head", 3)]
    rows = layer_rows(layers, lambda one: one[0], lambda one: one[1])
    assert [(row.name, [name for name, _ in row.layers]) for row in rows] == [
        ("m.*.a", ["m.0.a", "m.2.a"]),
        ("m.1.a", ["m.1.a"]),
        ("m.*.b", ["m.0.b", "m.1.b"]),
        ("head", ["head"]),
    ]
    every = layer_rows(layers, lambda one: one[0], lambda one: one[1], every_layer=True)
    assert [row.name for row in every] == [name for name, _ in layers]


def test_the_shape_says_how_many_layers_there_are() -> None:
    assert LayerRow("a", [0]).shape((2, 3)) == "2 x 3"
    assert LayerRow("a", [0, 0, 0]).shape((2, 3)) == "2 x 3  x3"


def test_a_shared_row_sums_sizes_and_shows_spans(capsys: pytest.CaptureFixture[str]) -> None:
    layers = [
        layer(f"m.{block}.a", bytes=10**6, bits_per_weight=4.5 + block / 8, output_error=error)
        for block, error in enumerate((0.02, 0.01, 0.015))
    ]
    head, row, note, *_ = printed(layers, capsys)
    assert head == ["layer", "shape", "scheme", "bits/weight", "size", "output error"]
    scheme = "rtn 4 bit g32 asym, dense"
    numbers = ["4.500 to 4.750", "3.0 MB", "1.000% to 2.000%"]
    assert row == ["m.*.a", "8 x 64", "x3", scheme, *numbers]
    assert "sizes are summed" in note[0]
    _, *rows = printed(layers, capsys, every_layer=True)
    assert [cells[0] for cells in rows[:3]] == ["m.0.a", "m.1.a", "m.2.a"]
    assert rows[0][3:] == ["4.500", "1.0 MB", "2.000%"]
    assert not any("sizes are summed" in cells[0] for cells in rows if cells)


def test_equal_numbers_are_no_span(capsys: pytest.CaptureFixture[str]) -> None:
    _, row, *_ = printed([layer("m.0.a"), layer("m.1.a")], capsys)
    assert row[4:] == ["4.500", "0.0 MB", "not measured"]


def test_a_shared_row_shows_spans_of_losses_and_margins(
    capsys: pytest.CaptureFixture[str],
) -> None:
    choices = choice(0.01, 0.03, 2.0), choice(0.02, 0.03, 0.5)
    layers = [layer(f"m.{block}.a", choice=made) for block, made in enumerate(choices)]
    _, row, without, *_ = printed([*layers, layer("m.0.b")], capsys)
    assert row[-2:] == ["g32 0.01 to 0.02, g32 out 0.03", "50.0% to 200.0%"]
    assert without[-1] == "not measured"


@pytest.mark.parametrize(
    "other",
    [
        {"shape": [64, 8]},
        {"scheme": {**SCHEME, "bits": 3}},
        {"scheme": {**SCHEME, "clip": "mse"}},
        {"output_error": 0.5},
        {"choice": choice(1.0, 2.0, 1.0)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_layers_that_differ_by_more_have_rows_of_their_own(other: dict[str, Any]) -> None:
    rows = inventory_rows([layer("m.0.a"), layer("m.1.a"), layer("m.2.a", **other)])
    assert [row.name for row in rows] == ["m.*.a", "m.2.a"]


def test_sizes_of_clusters_make_no_rows() -> None:
    schemes = [{**SCHEME, "group_size": 0, "cluster_sizes": sizes} for sizes in ([3, 5], [4, 4])]
    layers = [layer(f"m.{block}.a", scheme=scheme) for block, scheme in enumerate(schemes)]
    assert len(inventory_rows(layers)) == 1


def test_plan_and_inspect_have_the_same_rows(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rule of its own for one block of two, on a model whose blocks are alike."""
    rules = [
        {"match": "@blocks", "method": "rtn", "bits": 4, "group_size": 32},
        {"match": "*.1.mlp.down_proj", "method": "rtn", "bits": 3, "group_size": 32},
    ]
    plan, none = Plan.from_dict({"rules": rules}), Calibration(samples=0)
    out = quantize(tiny("llama"), tmp_path / "out", plan, none).path
    job = prepare(tiny("llama"), plan, none)
    planned = [row for row in plan_rows(job.decisions) if row.layers[0].scheme is not None]
    assert cli.main(["inspect", str(out), "--json", str(tmp_path / "all.json")]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert shown[1 : len(planned) + 1] == [row.name for row in planned]
    assert shown[len(planned) + 1] == "a"
    found = [one["name"] for one in json.loads((tmp_path / "all.json").read_text())["layers"]]
    assert found == recorded_order(out) == [d.layer.name for d in job.scheme_layers()]
    assert cli.main(["inspect", str(out), "--layers"]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert shown[1 : len(found) + 1] == found


def test_experts_that_saw_too_few_tokens_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    counts = {"m.0.experts.0.a": (90, 0), "m.0.experts.1.a": (3, 61), "m.0.experts.2.a": (0, 64)}
    layers = [
        layer(name, tokens=tokens, tokens_borrowed=borrowed)
        for name, (tokens, borrowed) in counts.items()
    ]
    print_inventory(inventory_of([layer("m.0.b"), *layers]))
    shown = " ".join(capsys.readouterr().out.split())
    assert "experts: 2 of 3 matrices have seen fewer tokens than they have inputs" in shown
    assert "least: m.0.experts.2.a (0), m.0.experts.1.a (3); use more samples" in shown
    print_inventory(inventory_of([layer("m.0.b"), layers[0]]))
    shown = " ".join(capsys.readouterr().out.split())
    assert "experts: all 1 matrices have seen as many tokens as they have inputs" in shown
    print_inventory(inventory_of([layer("m.0.b")]))
    assert "experts" not in capsys.readouterr().out
