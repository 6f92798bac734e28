"""What `quantine plan` says of activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quantine import Calibration, Plan
from quantine.report.tables.plan import plan_lines
from quantine.run.estimate import estimate
from quantine.run.prepare import prepare

KV = "rounded while the model runs: key, value to 4 bits, a grid for each cluster"
STARTS = ("rounded while", "rotated", "channels of keys")


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (Plan.preset("gptq", bits=3, group_size=32), []),
        (Plan.scheme("W4A16"), []),
        (Plan.scheme("W4A4KV"), [KV]),
        (Plan.budget(4.5).with_activations("W4A4KV"), [KV]),
        (
            Plan.from_dict({"rules": [], "activations": {"hidden": 4, "rotated": ["hidden"]}}),
            [
                "rounded while the model runs: hidden to 4 bits, a grid for each cluster",
                "rotated before they are: hidden",
            ],
        ),
        (
            Plan.scheme("W4A4KV-rotated-mixed"),
            [
                KV,
                "rotated before they are: value",
                "channels of keys may have different bits, 4 on average",
            ],
        ),
        (
            Plan.scheme("W4A4-token"),
            [
                "rounded while the model runs: norm, softmax to 8 bits; query, key, value, "
                "attention, hidden to 4 bits, a grid for each token"
            ],
        ),
    ],
)
def test_rounded_activations_are_told(
    plan: Plan, said: list[str], tiny: Callable[[str], Path], short: Calibration
) -> None:
    job = prepare(tiny("llama"), plan, short)
    lines = plan_lines(job, estimate(job))
    assert [line for line in lines if line.startswith(STARTS)] == said
