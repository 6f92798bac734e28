"""What the caller has set in PyTorch and NumPy changes no byte of an output and no score."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import quantine
from ambient_states import STATES
from quantine import Calibration, Plan, evaluate, quantize
from quantine.formats.directory import REPORT, read_json
from tiny_models import byte_tokenizer

Tiny = Callable[[str], Path]
TOKENS = torch.tensor([byte_tokenizer()("Line 33: 22 apples and 10 pears.\nLine 34").input_ids])
PLANS: dict[str, Callable[[], Plan]] = {
    "rtn": lambda: Plan.preset("rtn", bits=4, group_size=32),
    "gptq": lambda: Plan.preset("gptq", bits=3, group_size=32),
    "spqr": lambda: Plan.preset("spqr"),
    "budget": lambda: Plan.budget(4.5),
    "W4A4": lambda: Plan.scheme("W4A4"),
}


def content(directory: Path) -> dict[str, Any]:
    """Every file of an output, but for measured times."""
    files: dict[str, Any] = {file.name: file.read_bytes() for file in directory.iterdir()}
    report = read_json(directory / REPORT)
    report.pop("run")
    for layer in report["layers"]:
        layer.pop("seconds")
    return {**files, REPORT: report, "README.md": b""}


@pytest.fixture(scope="module")
def usual(
    tiny: Tiny, short: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("usual")

    def directory(plan: str) -> Path:
        if not (root / plan).exists():
            quantize(tiny("llama"), root / plan, PLANS[plan](), short)
        return root / plan

    return directory


SLOW = {"budget", "W4A4"}
"""Plans that take more than a moment in each of the states."""


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "plan", [pytest.param(plan, marks=pytest.mark.slow if plan in SLOW else ()) for plan in PLANS]
)
def test_outputs_have_the_same_bytes(
    plan: str,
    state: str,
    usual: Callable[[str], Path],
    tiny: Tiny,
    short: Calibration,
    tmp_path: Path,
) -> None:
    with STATES[state]():
        quantize(tiny("llama"), tmp_path / "out", PLANS[plan](), short)
    assert content(tmp_path / "out") == content(usual(plan))


def test_random_numbers_of_others_neither_matter_nor_change(
    usual: Callable[[str], Path], tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    torch.manual_seed(77)
    np.random.seed(77)
    random.seed(77)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    quantize(tiny("llama"), tmp_path / "out", PLANS["budget"](), short)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert content(tmp_path / "out") == content(usual("budget"))


@pytest.fixture(scope="module")
def scores(usual: Callable[[str], Path], tiny: Tiny, text_file: Path) -> Callable[[], Any]:
    def measured() -> Any:
        found = evaluate(usual("W4A4"), str(text_file), window=32, limit=3, reference=tiny("llama"))
        return without_times(found["texts"])

    return measured


@pytest.fixture(scope="module")
def usual_scores(scores: Callable[[], Any]) -> Any:
    return scores()


@pytest.mark.parametrize("state", STATES)
def test_scores_are_the_same(state: str, scores: Callable[[], Any], usual_scores: Any) -> None:
    with STATES[state]():
        assert scores() == usual_scores


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k != "seconds"}
    return value


def logits_of(model: Any) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found.detach().clone()


@pytest.fixture(scope="module")
def usual_logits(usual: Callable[[str], Path]) -> Callable[[str], Tensor]:
    """Logits by the name of the plan, of a model loaded in the usual state."""

    @cache
    def logits(plan: str) -> Tensor:
        with torch.no_grad():
            return logits_of(quantine.load(usual(plan))[0])

    return logits


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("plan", PLANS)
def test_a_model_loaded_in_any_state_is_the_same(
    plan: str, state: str, usual: Callable[[str], Path], usual_logits: Callable[[str], Tensor]
) -> None:
    expected = usual_logits(plan)
    with STATES[state]():
        model, _ = quantine.load(usual(plan))
    with torch.no_grad():
        assert torch.equal(logits_of(model), expected)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())


@pytest.mark.parametrize("state", [name for name in STATES if name not in {"meta", "autocast"}])
@pytest.mark.parametrize("plan", ["gptq", "spqr", "W4A4"])
def test_a_loaded_model_computes_the_same_in_any_state(
    plan: str, state: str, usual: Callable[[str], Path]
) -> None:
    model, _ = quantine.load(usual(plan))
    with torch.no_grad():
        expected = logits_of(model)
    written = model.generate(TOKENS, max_new_tokens=8, do_sample=False).tolist()
    with STATES[state](), nullcontext() if state == "grad" else torch.no_grad():
        # Products that PyTorch multiplies itself may be coarser, as the caller asks; where it needs
        # gradients, packed products are exact. Activations of 4 bits turn either into other codes.
        close = 0.0
        if state in {"coarse", "grad"}:
            close = 1.0 if plan == "W4A4" else 0.05
        found = logits_of(model)
        assert float((found - expected).norm()) <= close * float(expected.norm())
        if close < 1.0:
            assert model.generate(TOKENS, max_new_tokens=8, do_sample=False).tolist() == written


@pytest.mark.parametrize("plan", ["gptq", "spqr"])
@torch.no_grad()
def test_autocast_rounds_what_it_lists_and_packed_products_follow_their_inputs(
    plan: str, usual: Callable[[str], Path]
) -> None:
    model, _ = quantine.load(usual(plan))
    expected = logits_of(model)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
    alone = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), alone)
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        found = logits_of(model).float()
    assert float((found - expected).norm() / expected.norm()) < 0.05
