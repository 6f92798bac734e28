"""Inputs that several matrices read are rounded once, in one launch with the norm before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantine import load
from quantine.kernels import backend
from quantine.runtime.modules import QuantLinear
from quantine.runtime.rounding_norm import is_known
from tiny_models import logits_of, some_tokens

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
pytest.importorskip("sklearn")

Packed = Callable[[str, str], Path]
READERS = ("q_proj", "k_proj", "v_proj")
TOKENS = some_tokens(5, batch=1)  # tiles, which the interpreter is quicker with


class Operators(TorchDispatchMode):
    """Counts operators of PyTorch by name, each of which is a launch or more, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.logits = torch.empty(0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return self.names.count(f"quantine::{name}")


def apart(model: Any) -> Any:
    """``model`` with every norm and every rounding in launches of their own."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.shared = None
    return model


def operators(model: nn.Module, tokens: Tensor) -> Operators:
    """What a forward of ``model`` with its matrices arranged runs, and its logits."""
    logits_of(model, tokens)
    with Operators() as found:
        found.logits = logits_of(model, tokens)
    return found


def blocks_of(model: Any) -> nn.ModuleList:
    found: nn.ModuleList = getattr(model.model, "decoder", model.model).layers
    return found


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) <= 2e-2 * float(expected.abs().max())


@pytest.mark.parametrize(("name", "plan"), [("llama", "W4A8"), ("opt", "W4A8"), ("llama", "W4A4")])
def test_results_are_those_of_separate_launches(
    packed: Packed, name: str, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load(packed(name, plan))
    monkeypatch.setattr(backend, "of", lambda *_: "triton")
    together = operators(model, TOKENS)
    expected, found = logits_of(apart(model), TOKENS), together.logits
    assert float((found - expected).abs().max()) <= 2e-2 * float(expected.abs().max())
    assert together.count("multiply_rounded") > 0
    # One rounding for q, k and v, and one for gate and up, each with its norm and gather.
    separate, blocks = operators(model, TOKENS), len(blocks_of(model))
    assert together.count("multiply_rounded") == separate.count("multiply_rounded")
    assert separate.count("round_inputs") == separate.count("multiply_rounded")
    fewer = separate.count("round_inputs") - together.count("round_inputs")
    assert fewer == (3 if name == "llama" else 2) * blocks
    gathers = [n.names.count("aten::index_select") for n in (together, separate)]
    assert gathers[1] - gathers[0] == 2 * blocks
    assert len(together.names) < len(separate.names)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_one_row(packed: Packed, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load(packed(name, "W4A8"))
    monkeypatch.setattr(backend, "of", lambda *_: "triton")
    block: Any = blocks_of(model)[0]
    norm = block.input_layernorm if name == "llama" else block.self_attn_layer_norm
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        normed = norm(x)
        with Operators() as found:
            products = [block.self_attn.get_submodule(n)(normed) for n in READERS]
        assert found.count("round_inputs") == 0
        separate = apart(block).self_attn
        assert_close(normed, norm(x))
        for one, reader in zip(products, READERS, strict=True):
            assert_close(one, separate.get_submodule(reader)(norm(x)))


@pytest.fixture
def llama(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> Any:
    model, _ = load(packed("llama", "W4A8"))
    monkeypatch.setattr(backend, "of", lambda *_: "triton")
    logits_of(model, TOKENS)  # arranges matrices
    return model


def test_hooks_see_and_change_what_one_matrix_reads(llama: Any) -> None:
    attention, seen = llama.model.layers[0].self_attn, []
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    attention.k_proj.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    found, heard = logits_of(llama, TOKENS), seen.pop()
    expected = logits_of(apart(llama), TOKENS)
    assert_close(heard, seen.pop())
    assert_close(found, expected)


def test_writing_to_an_input_makes_codes_anew(llama: Any) -> None:
    def write(_: nn.Module, args: tuple[Tensor]) -> None:
        args[0].mul_(2)

    unchanged = logits_of(llama, TOKENS)
    handle = llama.model.layers[0].self_attn.k_proj.register_forward_pre_hook(write)
    found = logits_of(llama, TOKENS)
    assert float((found - unchanged).abs().max()) > 0.05 * float(unchanged.abs().max())
    assert_close(found, logits_of(apart(llama), TOKENS))
    handle.remove()


def test_norms_and_grids_that_change_are_noticed(llama: Any) -> None:
    block = llama.model.layers[0]
    before = logits_of(llama, TOKENS)
    with torch.no_grad():
        block.input_layernorm.norm.weight.mul_(3)
    block.mlp.up_proj.inputs.scale = block.mlp.up_proj.inputs.scale * 4
    found = logits_of(llama, TOKENS)
    assert not torch.equal(found, before)
    assert block.mlp.up_proj.input_grid().inputs is not block.mlp.gate_proj.input_grid().inputs
    assert_close(found, logits_of(apart(llama), TOKENS))


def test_a_norm_with_a_hook_or_of_another_kind_computes_itself(llama: Any) -> None:
    norm = llama.model.layers[0].input_layernorm
    norm.norm.register_forward_hook(lambda _, args, output: output * 2)
    assert_close(logits_of(llama, TOKENS), logits_of(apart(llama), TOKENS))

    class Own(type(norm.norm)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            return -super().forward(hidden_states)

    norm.norm.__class__ = Own
    assert not is_known(norm.norm)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_among_themselves(llama: Any, copied: Callable[[nn.Module], Any]) -> None:
    block = copied(llama.model.layers[0])
    shared = block.self_attn.q_proj.shared
    assert shared is block.self_attn.v_proj.shared is block.input_layernorm.shared
    assert shared is not llama.model.layers[0].self_attn.q_proj.shared
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    with Operators() as found, torch.no_grad():
        normed = block.input_layernorm(x)
        products = [block.self_attn.get_submodule(n)(normed) for n in ("q_proj", "v_proj")]
    assert found.count("round_inputs") == 1
    with torch.no_grad():
        expected = [
            llama.model.layers[0].self_attn.get_submodule(n)(normed.clone())
            for n in ("q_proj", "v_proj")
        ]
    for one, other in zip(products, expected, strict=True):
        assert_close(one, other)
    block.self_attn.k_proj = nn.Identity()  # the last reader never comes
    del normed
    assert shared._kept is None


def test_inference_mode_shares_nothing(llama: Any) -> None:
    expected = logits_of(apart(copy.deepcopy(llama)), TOKENS)
    with torch.inference_mode(), Operators() as found:
        logits = llama(input_ids=TOKENS).logits
    assert found.count("round_inputs") == found.count("multiply_rounded")
    assert_close(logits, expected)


def test_norms_with_gradients_compute_themselves(llama: Any) -> None:
    norm = llama.model.layers[0].input_layernorm
    norm.norm.weight.requires_grad_()
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    assert norm(x).requires_grad
