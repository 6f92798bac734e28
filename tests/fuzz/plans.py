"""Damaged plans: they are read from files, and resolved for the matrices of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any, Final

import yaml

from fuzz import values
from fuzz.campaign import Target
from quantine import Plan
from quantine.calibrate.skeleton import skeleton
from quantine.families import described_family
from quantine.families.layers import find_layers
from quantine.plan.presets import PRESETS
from tiny_models import tiny_config

RULES: Final[tuple[dict[str, Any], ...]] = (
    {
        "name": "mixed",
        "arithmetic": "exact",
        "rules": [
            {"match": "*.mlp.*", "method": "gptq", "bits": 3, "group_size": 16, "act_order": True},
            {"match": "*q_proj", "method": "rtn", "bits": 4, "sym": True, "clip": "mse"},
            {"match": "@blocks", "method": "keep"},
        ],
    },
    {"rules": [{"match": "*", "method": "rtn", "bits": 8, "group_size": -1}]},
)


def build_plans(root: Path) -> None:
    """Every kind of plan, as a file; all fit the tiny model."""
    made = [Plan.preset(name) for name in (*PRESETS, "rtn", "gptq", "spqr")]
    made += [Plan.preset("adadim", inner="gptq")]
    made += [Plan.scheme(name) for name in ("W4A8-token", "W16A4", "W8A8-tensor")]
    made += [Plan.budget(3.5), Plan.preset("rtn").with_head(8)]
    (root / "plans").mkdir()
    for number, plan in enumerate([*RULES, *(plan.as_dict() for plan in made)]):
        file = root / "plans" / f"{number:02}.json"
        file.write_text(json.dumps(plan))
        _use(file)


def attempt(random: Random, root: Path, place: Path) -> None:
    """Read a damaged plan, resolve it, write it and read it again."""
    base = random.choice(sorted((root / "plans").iterdir()))
    changed = values.mutated_value(random, json.loads(base.read_text()))
    file = place.with_suffix(random.choice((".json", ".yaml")))
    try:
        text = json.dumps(changed) if file.suffix == ".json" else yaml.safe_dump(changed)
    except ValueError:  # Python writes no number of so many digits
        text = "{}"
    data = text.encode("utf-8", "surrogatepass")
    file.write_bytes(values.mutated_bytes(random, data) if random.random() < 0.2 else data)
    try:
        _use(file)
    finally:
        file.unlink()


def _use(file: Path) -> None:
    plan = Plan.from_file(file)
    config = tiny_config("llama", intermediate_size=128)
    plan.resolve(find_layers(skeleton(config), described_family(config.model_type)))
    Plan.from_dict(json.loads(json.dumps(plan.as_dict())))


PLANS: Final = Target("plans", 0.2, build_plans, attempt)
