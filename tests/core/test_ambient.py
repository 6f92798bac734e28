from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from ambient_states import STATES, coarse_products, default_device, default_dtype
from quantine.core.ambient import WORKSPACE, own_state, repeatable, without_autocast
from quantine.core.device import CPU


def observed() -> dict[str, object]:
    """What a computation sees of the state of PyTorch and NumPy."""
    return {
        "dtype": torch.get_default_dtype(),
        "device": str(torch.empty(0).device),
        "inference": torch.is_inference_mode_enabled(),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "coarse": torch.backends.mkldnn.matmul.fp32_precision not in {"ieee", "none"},
        "errors": np.geterr(),
    }


OWN = {
    "dtype": torch.float32,
    "device": "cpu",
    "inference": False,
    "grad": False,
    "autocast": False,
    "coarse": False,
    "errors": {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"},
}


@pytest.mark.parametrize("name", STATES)
def test_inside_the_state_is_always_the_same(name: str) -> None:
    with STATES[name]():
        before = observed()
        with own_state():
            assert observed() == OWN
        assert observed() == before


def test_all_states_at_once_and_an_error_inside() -> None:
    @own_state()
    def fail() -> None:
        assert observed() == OWN
        raise LookupError

    with (
        default_dtype(torch.float64),
        default_device("meta"),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        coarse_products(),
        np.errstate(all="raise"),
    ):
        before = observed()
        for _ in range(2):
            with pytest.raises(LookupError):
                fail()
            assert observed() == before


def test_gradients_can_be_asked_for_inside() -> None:
    with torch.inference_mode(), own_state(), torch.enable_grad():
        leaf = torch.ones(2, requires_grad=True)
        (leaf * leaf).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [2.0, 2.0]


def test_autocast_is_left_out_for_one_device_only_where_it_is_on() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with without_autocast(x.device):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
    with without_autocast(x.device):
        assert (x @ x).dtype == torch.float32


def settings() -> dict[str, Any]:
    """What decides whether PyTorch sums in the same order every time."""
    products = torch.backends.cuda.matmul
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills": torch.utils.deterministic.fill_uninitialized_memory,
        "benchmark": torch.backends.cudnn.benchmark,
        "short sums": products.allow_bf16_reduced_precision_reduction,
        "shorter sums": products.allow_fp16_reduced_precision_reduction,
        "workspace": os.environ.get(WORKSPACE[0]),
    }


def test_on_a_gpu_settings_that_let_sums_differ_hold_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.delenv(WORKSPACE[0], raising=False)
    before = settings()
    with repeatable(torch.device("cuda")):
        assert settings() == {
            "deterministic": True,
            "warns": False,
            "fills": False,
            "benchmark": False,
            "short sums": False,
            "shorter sums": False,
            "workspace": WORKSPACE[1],
        }
    assert settings() == before


def test_what_a_caller_has_set_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE[0], ":16:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = settings()
        with repeatable(torch.device("cuda")):
            assert settings()["workspace"] == ":16:8"
            assert not settings()["warns"]
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_cpu_sums_alike_without_settings() -> None:
    before = settings()
    with repeatable(CPU):
        assert settings() == before
