"""Inputs that several matrices read are rounded once, in one launch with the norm before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantine import load
from quantine.kernels import backend
from quantine.runtime.modules import QuantLinear
from quantine.runtime.rounding_norm import RoundingNorm
from tiny_models import logits_of, some_tokens

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
pytest.importorskip("sklearn")

Packed = Callable[[str, str], Path]


class Operators(TorchDispatchMode):
    """Counts operators of PyTorch by name, each of which is a launch or more, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return self.names.count(f"quantine::{name}")


def apart(model: nn.Module) -> nn.Module:
    """``model`` with every norm and every rounding in launches of their own."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.shared = None
    return model


@contextmanager
def operators(model: nn.Module, tokens: Tensor) -> Iterator[Operators]:
    logits_of(model, tokens)  # arranges matrices
    with Operators() as found:
        logits_of(model, tokens)
    yield found


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "of", lambda *_: "triton")


def rounding(model: nn.Module) -> list[QuantLinear]:
    return [m for m in model.modules() if isinstance(m, QuantLinear) and m.inputs is not None]


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(("name", "plan"), [("llama", "W4A8"), ("opt", "W4A8"), ("llama", "W4A4")])
def test_results_are_those_of_separate_launches(
    packed: Packed, name: str, plan: str, tokens: int
) -> None:
    model, _ = load(packed(name, plan))
    ids = some_tokens(tokens)[:1, :tokens]
    found = logits_of(model, ids)
    expected = logits_of(apart(model), ids)
    assert float((found - expected).abs().max()) <= 2e-2 * float(expected.abs().max())
