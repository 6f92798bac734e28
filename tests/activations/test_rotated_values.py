"""Values that are rotated by the weights around them: blocks compute what they did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantine import Calibration, Plan, load, quantize
from quantine.activations.install import rounding_points, value_link
from quantine.activations.rotated_values import rotate_values, turns_of_outputs
from quantine.core.activation_spec import ActivationSpec
from quantine.errors import FamilyError, PlanError
from quantine.families import described_family
from quantine.families.heads import Heads
from quantine.families.layers import block_list
from quantine.plan.shorthand import parse_shorthand
from tiny_models import (
    build,
    loud_states,
    random_model,
    some_tokens,
    stored_tensors,
    tiny_config,
)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "qwen3", "phi3", "neox_parallel"])
def test_a_block_whose_values_are_rotated_computes_the_same(name: str) -> None:
    model = random_model(tiny_config(name))
    family, tokens = described_family(model.config.model_type), some_tokens(16, 2)
    link, heads = value_link(family), Heads.of(model.config, family)
    assert link is not None
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in link.producers}

    def note(path: str) -> None:
        producer = block_list(model, family)[0].get_submodule(path)
        producer.register_forward_hook(lambda _m, _args, out: seen[path].append(out))

    for path in link.producers:
        note(path)
    block = block_list(model, family)[0]
    turns = turns_of_outputs(block, link, heads)
    with torch.no_grad():
        expected = model(tokens).logits
        rotate_values(block, link, heads)
        found = model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    for path, (before, after) in seen.items():
        assert not torch.allclose(before, after, atol=1e-2)
        torch.testing.assert_close(after, before @ turns[path], rtol=0, atol=1e-4)
        unit = torch.eye(len(turns[path]))
        torch.testing.assert_close(turns[path] @ turns[path].T, unit, rtol=0, atol=1e-5)


def test_values_that_are_bent_one_by_one_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    straight = LlamaAttention.forward

    def bent(self: LlamaAttention, *args: object, **kwargs: object) -> object:
        handle = self.v_proj.register_forward_hook(lambda _m, _args, out: out.abs())
        try:
            return straight(self, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(LlamaAttention, "forward", bent)
    model = build(tiny_config("llama"), tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("Some words to calibrate on, again and again. " * 40, encoding="utf-8")
    with pytest.raises(FamilyError, match=r"layers\.0 computes something else .* leave value out"):
        quantize(model, tmp_path / "out", Plan.scheme("W4A4KV-rotated"), Calibration(text, 4, 32))
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("loud", ["tokens", "channels"])
def test_values_are_rotated_where_that_pays(loud: str, short: Calibration, tmp_path: Path) -> None:
    directory = loud_states(tmp_path / "model")
    if loud == "channels":
        directory = build(tiny_config("llama"), tmp_path / "other")
        model = AutoModelForCausalLM.from_pretrained(directory)
        for block in model.model.layers:
            with torch.no_grad():
                block.self_attn.v_proj.weight[::8] *= 50
                block.self_attn.o_proj.weight[:, ::8] /= 50
        model.save_pretrained(directory)
    quantize(directory, tmp_path / "out", Plan.scheme("W16A4KV-rotated"), short)
    grids = [name for name in stored_tensors(tmp_path / "out") if name.endswith("head_reach")]
    assert bool(grids) == (loud == "tokens")
    plain = distance_of(directory, Plan.scheme("W16A4KV"), short, tmp_path / "plain")
    assert distance_of(directory, Plan.scheme("W16A4KV-rotated"), short, tmp_path / "r") <= plain


def distance_of(directory: Path, plan: Plan, calibration: Calibration, out: Path) -> float:
    """How far the logits of the quantized model are from those of the float one, squared."""
    quantize(directory, out, plan, calibration)
    tokens = some_tokens(48, 2)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(directory)(tokens).logits
        found = load(out)[0](tokens).logits
    return float((found - expected).square().mean())


@pytest.mark.parametrize(
    "fields", [{"value": 8}, {"value": 4, "range": "minmax"}, {"value": 4, "token_factors": False}]
)
def test_values_without_factors_are_not_rotated(fields: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="value can be rotated with fewer than 8 bits, range sea"):
        ActivationSpec(rotated=("value",), **fields)


def test_names_of_schemes_rotate_values_and_mix_keys() -> None:
    spec = parse_shorthand("W4A3KV-rotated-mixed").activations
    assert (spec.rotated, spec.mixed_keys, spec.key, spec.value) == (("value",), True, 3, 3)
    assert not parse_shorthand("W4A3KV").activations.mixed_keys
    assert parse_shorthand("W4A4-mixed").activations.mixed_keys
    for name, reason in (
        ("W4A8-mixed", "needs keys of fewer than 8 bits, not 8"),
        ("W4A4KV-token-mixed", "granularity cluster and range search, not with token"),
        ("W4A4-faithful-mixed", "granularity cluster and range search, not with cluster and run"),
    ):
        with pytest.raises(PlanError, match=f"scheme {name}: .*{reason}"):
            parse_shorthand(name)


def test_values_stay_where_nothing_says_how_they_are_read() -> None:
    model = random_model(tiny_config("llama"))
    family = described_family(model.config.model_type)
    assert any(point.site == "value" for point in rounding_points(family))
    without = replace(family, links=tuple(link for link in family.links if link.kind != "R3"))
    assert value_link(without) is None
