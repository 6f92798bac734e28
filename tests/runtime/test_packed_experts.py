"""Packed experts of a loaded model: the chosen ones are multiplied together, and as if alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantine
from quantine import Calibration, Plan
from quantine.families.experts import Experts
from quantine.runtime import experts as packed_experts
from quantine.runtime.experts import PackedExperts
from quantine.survey.specimen import specimen_config, write_specimen

pytest.importorskip("quantine._native", reason="the native extension is not installed")


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> PackedExperts:
    """Experts without biases; and with, whose gates and ups are interleaved."""
    scratch = tmp_path_factory.mktemp("experts")
    write_specimen(specimen_config(request.param), scratch / "model")
    plan = Plan.preset("rtn", bits=4, group_size=16)
    quantine.quantize(scratch / "model", scratch / "out", plan, Calibration(samples=0))
    model, _ = quantine.load(scratch / "out")
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
