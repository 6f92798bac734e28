"""Inputs that are rotated before they are rounded: blocks compute what they did, on finer grids."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import quantine
from quantine import Calibration, Plan
from quantine.activations.grids import StaticGrid
from quantine.activations.install import RoundingPoint, rotate_inputs, rounding_points
from quantine.activations.rotated_inputs import RotatedGrid, RotatedInputs
from quantine.core.activation_spec import INPUT_SITES, ActivationSpec, activations_from
from quantine.core.fit_range import fit_activations_around_zero
from quantine.core.rotation import Rotation
from quantine.engines.vllm.stored import Stored
from quantine.errors import FormatError, PlanError
from quantine.families import described_family
from quantine.families.layers import block_list
from quantine.rptq.choose_grids import matrix_of
from quantine.rptq.smoothing import least_noise
from quantine.runtime.modules import QuantLinear
from tiny_models import build, logits_of, random_model, some_tokens, tiny_config

CHANNELS: Final = 96
BITS: Final = dict.fromkeys(INPUT_SITES, 4)


def one_grid(seen: Tensor) -> StaticGrid:
    """One grid of 4 bits for all channels, with factors of tokens."""
    scale, zero = fit_activations_around_zero(seen.min().view(1), seen.max().view(1), 4)
    labels = torch.zeros(CHANNELS, dtype=torch.int32)
    return StaticGrid(4, scale, zero, labels, reach=torch.tensor([0.85]))


def test_one_grid_suits_loud_and_quiet_channels_behind_a_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, CHANNELS, generator=generator)
    weight = torch.randn(32, CHANNELS, generator=generator)
    x[:, 5] += 100  # a loud channel that is always alike, and one that a weight expects
    x[:, 7] *= 40
    weight[:, 7] /= 40
    rotation = Rotation(CHANNELS, None)

    def rotated_error(smoothing: Tensor) -> float:
        turned = rotation.turned(x / smoothing)
        grid = RotatedGrid(one_grid(turned - turned.mean(0)), smoothing, turned.mean(0))
        return error(grid(x) @ rotation.turned(weight * smoothing).T)

    def error(found: Tensor) -> float:
        return float((found - x @ weight.T).square().mean())

    plain = error(one_grid(x)(x) @ weight.T)
    rotated = rotated_error(torch.ones(CHANNELS))
    smooth = rotated_error(least_noise(x, [weight]))
    assert smooth < rotated / 4 < plain / 8


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "qwen2"])
def test_a_block_that_rotates_its_inputs_computes_the_same(name: str) -> None:
    model = random_model(tiny_config(name))
    family, tokens = described_family(model.config.model_type), some_tokens(16, 2)
    widths = {
        point.kind: matrix_of(block_list(model, family)[0].get_submodule(point.path)).shape[1]
        for point in rounding_points(family)
        if point.site in INPUT_SITES
    }
    smoothings = {kind: torch.rand(width) + 0.5 for kind, width in widths.items()}

    def smoothing(point: RoundingPoint) -> Tensor | None:
        return smoothings[point.kind] if point.site in INPUT_SITES else None

    with torch.no_grad():
        expected = logits_of(model, tokens)
        for index, block in enumerate(block_list(model, family)):
            rotate_inputs(block, family.in_block(index), smoothing)
        found = logits_of(model, tokens)
    assert any(isinstance(module, RotatedInputs) for module in model.modules())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("scheme", ["W16A8", "W8A8", "W4A4", "W4A4-faithful"])
def test_a_model_keeps_its_rotations_on_disk(scheme: str, tmp_path: Path, prose: Path) -> None:
    source = build(tiny_config("llama"), tmp_path / "model")
    plan = Plan.scheme(scheme)
    assert plan.activations is not None
    rotating = replace(plan.activations, rotated=INPUT_SITES)
    calibration = Calibration(str(prose), samples=16, seqlen=64)
    quantine.quantize(source, tmp_path / "out", replace(plan, activations=rotating), calibration)
    model, _ = quantine.load(tmp_path / "out", torch.float32)
    grids = [m for m in model.modules() if isinstance(m, RotatedGrid)]
    assert len(grids) == 7 * model.config.num_hidden_layers
    # Kernels that round by themselves know no rotation.
    matrices = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert all(m.input_grid() is None for m in matrices if m.inputs is not None)
    if scheme == "W16A8":
        floating = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        with torch.no_grad():
            found = logits_of(model, some_tokens(64, 4)).log_softmax(-1)
            floats = logits_of(floating, some_tokens(64, 4)).log_softmax(-1)
        assert 0 < float((floats.exp() * (floats - found)).sum(-1).mean()) < 0.05


@pytest.mark.parametrize("loud", [1e-20, 1.0, 1e20])
def test_divisors_of_any_input_are_within_what_files_may_hold(loud: float) -> None:
    x = torch.randn(64, CHANNELS) * torch.linspace(-9, 9, CHANNELS).exp() * loud
    x[:, 3] = 0
    weight = torch.randn(32, CHANNELS)
    weight[:, 4] = 0
    found = least_noise(x, [weight])
    centre = torch.zeros(CHANNELS)
    RotatedGrid(one_grid(torch.randn(64, CHANNELS)), found, centre).check("name", CHANNELS)
    assert found.max() > 2 * found.min()


@pytest.mark.parametrize(
    ("name", "value"),
    [("smoothing", 1e-44), ("smoothing", 0), ("smoothing", math.nan), ("centre", math.inf)],
)
def test_damaged_tensors_are_refused_by_name(name: str, value: float) -> None:
    tensors = {"smoothing": torch.ones(CHANNELS), "centre": torch.zeros(CHANNELS)}
    tensors[name][5] = value
    grid = RotatedGrid(one_grid(torch.randn(64, CHANNELS)), **tensors)
    with pytest.raises(FormatError, match=rf"down_proj\.inputs\.{name} .* damaged"):
        grid.check("down_proj.inputs", CHANNELS)


def test_what_cannot_be_rotated_is_refused() -> None:
    with pytest.raises(PlanError, match="rotated must list some of norm, attention, hidden"):
        ActivationSpec(**BITS, rotated=("key",))
    with pytest.raises(PlanError, match="hidden cannot be rotated"):
        ActivationSpec(norm=4, rotated=("hidden",))
    for wrong in (None, 5, "norm", ["norm"], ("norm", "norm"), (["norm"],)):
        with pytest.raises(PlanError, match="rotated must list some of"):
            ActivationSpec(**BITS, rotated=wrong)
    with pytest.raises(PlanError, match="granularity tensor does not go with rotated"):
        ActivationSpec(**BITS, granularity="tensor", rotated=("norm",))
    with pytest.raises(PlanError, match="here: rotated must be a list"):
        activations_from({**BITS, "rotated": "norm"}, "here")
    spec = ActivationSpec(**BITS, rotated=("attention", "hidden"))
    assert activations_from(spec.as_dict(), "here") == spec
    assert "rotated" not in ActivationSpec(**BITS).as_dict()


def test_vllm_does_not_serve_it() -> None:
    rotating = {"hidden": 4, "rotated": ["hidden"]}
    settings = {"format_version": 3, "schemes": [], "layers": {}, "activations": rotating}
    with pytest.raises(PlanError, match=r"hidden are rotated .* not served by vLLM yet"):
        Stored.of(settings)
