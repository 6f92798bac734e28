"""What rounding writes of a norm is what the norms of model families compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from quantine.activations.modules import PermutedNorm
from quantine.kernels.integer.input_grid import InputGrid
from quantine.kernels.integer.units.inputs import (
    InputUnits,
    Norm,
    normed_reference,
    round_reference,
)
from samples import generator

LENGTHS = (5, 40, 19)
WIDTH = sum(LENGTHS)
EPS = 1e-3
CLOSE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

NORMS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaRMSNorm(WIDTH, EPS),
    "qwen3": lambda: Qwen3RMSNorm(WIDTH, EPS),
    "gemma": lambda: Gemma2RMSNorm(WIDTH, EPS),
    "opt": lambda: nn.LayerNorm(WIDTH, EPS),
    "no bias": lambda: nn.LayerNorm(WIDTH, EPS, bias=False),
}


def normed(kind: str, dtype: torch.dtype) -> tuple[nn.Module, Norm]:
    """A norm with random numbers, and the same one as programs have it."""
    module = NORMS[kind]().to(dtype)
    for number, parameter in enumerate(module.parameters()):
        parameter.data = torch.randn(WIDTH, generator=generator(number)).to(dtype)
    module.requires_grad_(False)
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    weight = weight.float() + 1.0 if kind == "gemma" else weight
    return module, Norm(weight, bias, EPS, isinstance(module, nn.LayerNorm))


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("kind", NORMS)
def test_norms_of_families(kind: str, dtype: torch.dtype, ordered: bool, stored: bool) -> None:
    module, norm = normed(kind, dtype)
    order, columns = (torch.randperm(WIDTH, generator=generator(seed)) for seed in (3, 4))
    grid = InputGrid(8)
    inputs = InputUnits.of(grid, LENGTHS, columns if stored else None, torch.device("cpu"))
    units = (inputs.gathered(order) if ordered else inputs).after(norm)
    x = (torch.randn(7, WIDTH, generator=generator(5)) * 3 + 1).to(dtype)
    expected = (PermutedNorm(module, order) if ordered else module)(x)
    found = normed_reference(x, units)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    if dtype == torch.float32:  # where nothing is lost in between
        ones, others = round_reference(x, units), round_reference(found, inputs)
        assert torch.equal(ones.codes, others.codes)
        assert torch.equal(ones.scale, others.scale)
