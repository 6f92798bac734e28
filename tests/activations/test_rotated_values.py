"""Values that are rotated by the weights around them: blocks compute what they did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantine import Calibration, Plan, quantize
from quantine.activations.install import rounding_points, value_link
from quantine.activations.rotated_values import rotate_values, turns_of_outputs
from quantine.errors import FamilyError, PlanError
from quantine.families import described_family
from quantine.families.heads import Heads
from quantine.families.layers import block_list
from quantine.plan.shorthand import parse_shorthand
from tiny_models import build, random_model, some_tokens, tiny_config


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
