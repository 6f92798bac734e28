"""Inputs that are rotated before they are rounded: blocks compute what they did, on finer grids."""

from __future__ import annotations

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
from quantine.activations.install import rotate_inputs
from quantine.activations.rotated import RotatedGrid, RotatedInputs
from quantine.core.activation_spec import INPUT_SITES, ActivationSpec, activations_from
from quantine.core.fit_range import fit_activations_around_zero
from quantine.core.rotation import Rotation
from quantine.engines.vllm.stored import Stored
from quantine.errors import PlanError
from quantine.families import described_family
from quantine.families.layers import block_list
from quantine.runtime.modules import QuantLinear
from tiny_models import build, logits_of, random_model, some_tokens, tiny_config

CHANNELS: Final = 96
BITS: Final = dict.fromkeys(INPUT_SITES, 4)


def grid_for(x: Tensor, rotated: bool) -> StaticGrid:
    """One grid of 4 bits for all channels, with factors of tokens."""
    turned = Rotation(CHANNELS, None).turned(x)
    centre = turned.mean(0)
    seen = turned - centre if rotated else x
    scale, zero = fit_activations_around_zero(seen.min().view(1), seen.max().view(1), 4)
    labels = torch.zeros(CHANNELS, dtype=torch.int32)
    plain = StaticGrid(4, scale, zero, labels, reach=torch.tensor([0.85]))
    return RotatedGrid(plain, centre) if rotated else plain


def test_one_grid_suits_loud_and_quiet_channels_behind_a_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, CHANNELS, generator=generator)
    x[:, 7] *= 40
    x[:, 5] += 100
    weight = torch.randn(32, CHANNELS, generator=generator)
    weight[:, 7] /= 40
    wanted = x @ weight.T
    plain = grid_for(x, rotated=False)(x) @ weight.T
    rotated = grid_for(x, rotated=True)(x) @ Rotation(CHANNELS, None).turned(weight).T
    errors = [float((found - wanted).square().mean()) for found in (plain, rotated)]
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "qwen2"])
def test_a_block_that_rotates_its_inputs_computes_the_same(name: str) -> None:
    model = random_model(tiny_config(name))
    family, tokens = described_family(model.config.model_type), some_tokens(16, 2)
    with torch.no_grad():
        expected = logits_of(model, tokens)
        for index, block in enumerate(block_list(model, family)):
            spec = ActivationSpec(**BITS, rotated=INPUT_SITES)
            rotate_inputs(block, family.in_block(index), spec)
        found = logits_of(model, tokens)
    assert any(isinstance(module, RotatedInputs) for module in model.modules())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("scheme", ["W16A8", "W4A4"])
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


def test_what_cannot_be_rotated_is_refused() -> None:
    with pytest.raises(PlanError, match="rotated must list some of norm, attention, hidden"):
        ActivationSpec(**BITS, rotated=("key",))
    with pytest.raises(PlanError, match="hidden cannot be rotated"):
        ActivationSpec(norm=4, rotated=("hidden",))
    with pytest.raises(PlanError, match="norm cannot be rotated"):
        ActivationSpec(**BITS, granularity="tensor", rotated=("norm",))
    with pytest.raises(PlanError, match="here: rotated must be a list"):
        activations_from({**BITS, "rotated": "norm"}, "here")
    spec = ActivationSpec(**BITS, rotated=("attention", "hidden"))
    assert activations_from(spec.as_dict(), "here") == spec


def test_vllm_does_not_serve_it() -> None:
    rotating = {"hidden": 4, "rotated": ["hidden"]}
    settings = {"format_version": 3, "schemes": [], "layers": {}, "activations": rotating}
    with pytest.raises(PlanError, match=r"hidden are rotated .* not served by vLLM yet"):
        Stored.of(settings)
