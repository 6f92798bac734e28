"""The arithmetic of a plan: stored, shown, obeyed, and near to exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantine
from quantine.core.arithmetic import ARITHMETICS
from quantine.formats.inventory import inventory
from quantine.kernels import backend
from quantine.kernels.matrix import FEW_ROWS
from quantine.runtime.packed import packed_modules
from tiny_models import FAMILIES, bits_equal, logits_of, some_tokens

Tiny = Callable[[str], Path]
PackedModel = Callable[[str, str], Path]

SPQR = {"method": "spqr", "format": "spqr", "bits": 3, "group_size": 16, "scale_bits": 3}
FIELDS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "bits": 4, "group_size": 32},
    "spqr": SPQR | {"zero_bits": 3, "stat_group_size": 16, "groups": "refit"},
}


def arithmetics_of(model: Any) -> set[str]:
    return {module.arithmetic for _, module in packed_modules(model)}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    # Of logits, relative to the largest; processors that can multiply many rows in bfloat16, others
    # exactly.
    ("rows", "bound"),
    [(FEW_ROWS, 2e-3), (FEW_ROWS + 1, 0.1)],
)
def test_fast_logits_are_near_to_exact_ones(
    name: str, rows: int, bound: float, packed: PackedModel
) -> None:
    directory, tokens = packed(name, "mixed"), some_tokens(rows, batch=1)
    exact, fast = (
        logits_of(quantine.load(directory, torch.float32, arithmetic)[0], tokens)
        for arithmetic in ARITHMETICS
    )
    difference = (fast - exact).abs().max()
    assert difference <= bound * exact.abs().max()
    assert (difference > 0) == (rows <= FEW_ROWS or backend.extension().has_bfloat16())


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("stated", [None, *ARITHMETICS])
def test_a_plan_decides(
    kind: str, stated: str | None, tiny: Tiny, short: quantine.Calibration, tmp_path: Path
) -> None:
    plan = {"rules": [{"match": "@blocks", **FIELDS[kind]}]}
    plan |= {} if stated is None else {"arithmetic": stated}
    out = tmp_path / "out"
    quantine.quantize(tiny("llama"), out, quantine.Plan.from_dict(plan), short)
    wanted = stated or "fast"
    assert json.loads((out / "quantine_report.json").read_text())["plan"]["arithmetic"] == wanted
    assert f"| arithmetic | {wanted} |" in (out / "README.md").read_text()
    assert inventory(out)["arithmetic"] == wanted
    model, _ = quantine.load(out)
    assert arithmetics_of(model) == {wanted}
    other = next(a for a in ARITHMETICS if a != wanted)
    assert arithmetics_of(quantine.load(out, arithmetic=other)[0]) == {other}
    if kind == "spqr":
        return
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert arithmetics_of(again) == {wanted}
    assert bits_equal(logits_of(again), logits_of(model))


def test_directories_that_do_not_say_are_exact(packed: PackedModel, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in packed("llama", "rtn").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]["arithmetic"]
    (copy / "config.json").write_text(json.dumps(config))
    assert inventory(copy)["arithmetic"] == "exact"
    assert arithmetics_of(quantine.load(copy)[0]) == {"exact"}
    config["quantization_config"]["arithmetic"] = "sloppy"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(quantine.FormatError, match="one of exact, fast, not 'sloppy'"):
        quantine.load(copy)


def test_unknown_ones_are_refused(packed: PackedModel) -> None:
    odd: Any = "sloppy"
    with pytest.raises(quantine.PlanError, match="one of exact, fast, not 'sloppy'"):
        quantine.load(packed("llama", "rtn"), arithmetic=odd)
    for value in (odd, True, None, ["fast"]):
        plan = {"rules": [{"match": "@blocks", "method": "rtn"}], "arithmetic": value}
        with pytest.raises(quantine.PlanError, match="arithmetic must be one of exact, fast"):
            quantine.Plan.from_dict(plan)
