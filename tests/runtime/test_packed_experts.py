"""Packed experts of a loaded model: the chosen ones are multiplied together, and as if alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantine
from quantine import Calibration, Plan
from quantine.families.experts import Experts
from quantine.kernels import backend
from quantine.runtime import experts as packed_experts
from quantine.runtime.experts import PackedExperts
from quantine.runtime.graph_decoder import NoHost
from quantine.survey.specimen import specimen_config, write_specimen
from tiny_models import logits_of, some_tokens

pytest.importorskip("quantine._native", reason="the native extension is not installed")


NARROW = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
}
"""Triton's interpreter calls a program for every few rows of a matrix."""


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts without biases; and with, whose gates and ups are interleaved."""
    scratch = tmp_path_factory.mktemp("experts")
    config = specimen_config(request.param)
    config.update(NARROW)
    write_specimen(config, scratch / "model")
    plan = Plan.preset("rtn", bits=4, group_size=16)
    return quantine.quantize(scratch / "model", scratch / "out", plan, Calibration(samples=0)).path


@pytest.fixture(scope="module")
def loaded(directory: Path) -> PackedExperts:
    """The experts of the first block."""
    model, _ = quantine.load(directory)
    found = model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(found, PackedExperts)
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of a product of several experts."""
    found: list[int] = []
    product = packed_experts.grouped_product

    def counted(experts: Any, x: Tensor, *rest: Any) -> list[Tensor]:
        found.append(len(x))
        return product(experts, x, *rest)

    monkeypatch.setattr(packed_experts, "grouped_product", counted)
    return found


def alone(experts: PackedExperts, x: Tensor, counts: list[int]) -> Tensor:
    return Experts.run(experts, x, counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", [[0, 1, 0, 0], [1, 2, 0, 5], [9, 0, 0, 0], [3, 70, 1, 2]])
def test_two_calls_do_for_all_chosen_experts(
    counts: list[int], dtype: torch.dtype, loaded: PackedExperts, calls: list[int]
) -> None:
    width: int = loaded.get_submodule("0.up_proj").in_features  # type: ignore[assignment]
    x = torch.randn(sum(counts), width, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        found, expected = loaded.run(x, counts), alone(loaded, x, counts)
    assert calls == [sum(counts)] * 2
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_no_row_is_no_call(loaded: PackedExperts, calls: list[int]) -> None:
    x = torch.empty(0, loaded.get_submodule("0.up_proj").in_features)  # type: ignore[arg-type]
    with torch.no_grad():
        assert loaded.run(x, [0, 0, 0, 0]).shape == x.shape
    assert not calls


def test_what_is_put_onto_a_chosen_expert_is_called(
    loaded: PackedExperts, calls: list[int]
) -> None:
    x = torch.randn(3, loaded.get_submodule("0.up_proj").in_features)  # type: ignore[arg-type]
    seen: list[int] = []
    handle = loaded.get_submodule("1.down_proj").register_forward_hook(
        lambda module, args, output: seen.append(len(output))
    )
    with torch.no_grad():
        loaded.run(x, [1, 2, 0, 0])
        assert (seen, calls) == ([2], [])
        loaded.run(x, [1, 0, 2, 0])  # which others chose
        assert calls == [3, 3]
        handle.remove()


def test_kept_matrices_and_unlike_arithmetic_are_multiplied_one_by_one(
    loaded: PackedExperts, calls: list[int]
) -> None:
    x = torch.randn(3, loaded.get_submodule("0.up_proj").in_features)  # type: ignore[arg-type]
    packed: Any = loaded.get_submodule("1.up_proj")
    with torch.no_grad():
        expected = loaded.run(x, [1, 2, 0, 0])
        calls.clear()
        packed.arithmetic, stated = "exact", packed.arithmetic
        other = loaded.run(x, [1, 2, 0, 0])
        assert not calls
        torch.testing.assert_close(other, expected, rtol=1e-3, atol=1e-3)
        packed.arithmetic = stated
        linear = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None)
        linear.weight.copy_(packed.dequantize())
        if packed.bias is not None:
            linear.bias.copy_(packed.bias)
        loaded[1].up_proj = linear  # type: ignore[assignment]
        kept = loaded.run(x, [1, 2, 0, 0])
        loaded[1].up_proj = packed
    assert not calls
    torch.testing.assert_close(kept, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture
def on_gpu(loaded: PackedExperts, monkeypatch: pytest.MonkeyPatch) -> PackedExperts:
    """A copy whose tensors are where a GPU's programs compute, which Triton interprets."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    monkeypatch.setattr(backend, "of", lambda *_: "triton")
    return copy.deepcopy(loaded)


def routed(tokens: int, chosen: int, experts: PackedExperts) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the experts of each, of which one has none, and their weights."""
    generator = torch.Generator().manual_seed(tokens)
    width: int = experts.get_submodule("0.up_proj").in_features  # type: ignore[assignment]
    x = torch.randn(tokens, width, generator=generator)
    index = torch.rand(tokens, len(experts) - 1, generator=generator).argsort(1)[:, :chosen]
    return x, index, torch.rand(tokens, chosen, generator=generator)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """As near as float16 is."""
    assert float((found - expected).abs().max()) <= 5e-3 * float(expected.abs().max())


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_gpu_runs_experts_without_the_host(
    tokens: int, loaded: PackedExperts, on_gpu: PackedExperts
) -> None:
    routes = routed(tokens, 2, on_gpu)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "of", lambda *_: "reference")
        expected = Experts.mixed(loaded, *routes)
    with torch.no_grad():
        on_gpu(*routed(1, 1, on_gpu))  # arranges matrices
        with NoHost():
            found = on_gpu(*routes)
    assert_near(found, expected)


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_gpu_hands_tokens_back_without_the_host(
    tokens: int,
    loaded: PackedExperts,
    on_gpu: PackedExperts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = len(on_gpu)
    monkeypatch.setattr(on_gpu, "_layout", replace(on_gpu._layout, choices=2 * count))
    x, index, weights = routed(tokens, 2, on_gpu)
    index[:, 0] += count  # which is behind all experts
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "of", lambda *_: "reference")
        one = Experts.mixed(loaded, x, index[:, 1:], weights[:, 1:])
    with torch.no_grad():
        on_gpu(*routed(1, 1, on_gpu))  # arranges matrices
        with NoHost():
            found = on_gpu(x, index, weights)
    assert_near(found, x * weights[:, :1] + one)


def test_a_gpu_runs_what_experts_have_now(on_gpu: PackedExperts) -> None:
    _, index, weights = routes = routed(1, 1, on_gpu)
    last: Any = on_gpu.get_submodule(f"{int(index)}.down_proj")
    with torch.no_grad():
        before = on_gpu(*routes)
        last.get_buffer("codes").zero_()
        after = on_gpu(*routes)
        assert not torch.allclose(before, after)
        handle = last.register_forward_hook(lambda module, args, output: output + 1.0)
        assert_near(on_gpu(*routes), after + weights)  # each is called by itself
        handle.remove()
        assert torch.equal(on_gpu.to(torch.float32)(*routes), after)
    ups: list[Any] = [on_gpu.get_submodule(f"{n}.up_proj").matrix() for n in range(len(on_gpu))]
    memory = ups[0].words.untyped_storage()  # which all of them are in, once
    assert all(m.words.untyped_storage().data_ptr() == memory.data_ptr() for m in ups)
    assert memory.nbytes() == sum(matrix.words.nbytes for matrix in ups)


def test_a_whole_mixture_on_a_gpu(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    tokens = some_tokens(3)
    expected = logits_of(quantine.load(directory, arithmetic="exact")[0], tokens)
    monkeypatch.setattr(backend, "of", lambda *_: "triton")
    model, _ = quantine.load(directory)
    found = logits_of(model, tokens)
    assert float((found - expected).abs().max()) <= 1e-2 * float(expected.abs().max())


def test_compiled_experts_are_one_operator(loaded: PackedExperts) -> None:
    routes, seen = routed(3, 2, loaded), []

    def look(graph: Any, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    whole = torch.compile(loaded, fullgraph=True, backend=look)
    with torch.no_grad():
        torch.testing.assert_close(whole(*routes), loaded(*routes))
    assert [name for name in seen if "run_experts" in name] == seen
    operands = (*routes, loaded._number)
    outcomes = torch.library.opcheck(torch.ops.quantine.run_experts.default, operands)
    assert set(outcomes.values()) == {"SUCCESS"}
