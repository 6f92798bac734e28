"""Mixtures of experts: quantized, saved and loaded, each expert's matrices are packed alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quantine
from quantine import CheckpointError, FamilyError, Plan
from quantine.families.experts import experts_in, separate
from quantine.formats.export import export
from quantine.runtime.packed import packed_modules
from quantine.survey.specimen import specimen_config, write_specimen
from tiny_models import bits_equal, logits_of, stored_tensors

KINDS = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "granitemoe"),
    *("llama4", "longcat_flash"),
)
"""Stored as w1, w2 and w3; by our names, once beside a shared expert; fused,
transposed and interleaved, with biases; beside blocks without; fused and renamed; fused, transposed
and called in turn; some of which hand tokens back."""


def source_of(kind: str, directory: Path) -> Path:
    write_specimen(specimen_config(kind), directory)
    return directory


def expected_of(source: Path, packed: nn.Module) -> Any:
    """The float model of ``source`` with what the packed matrices of a model stand for."""
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    separate(model)
    with torch.no_grad():
        for name, module in packed_modules(packed):
            model.get_submodule(name).weight.copy_(module.dequantize())
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_computes_with_the_packed_experts(
    kind: str, tmp_path: Path, short: quantine.Calibration
) -> None:
    source = source_of(kind, tmp_path / "model")
    rules = [{"match": "@blocks", "method": "rtn", "bits": 4, "group_size": 16}]
    plan = Plan.from_dict({"arithmetic": "exact", "rules": rules})
    result = quantine.quantize(source, tmp_path / "out", plan, short)
    model, _ = quantine.load(result.path)
    weights = {name for name, _ in packed_modules(model)}
    inside = {
        f"{path}.{name}"
        for path, experts in experts_in(model).items()
        for name, _ in experts.named_modules()
        if name.endswith("_proj")
    }
    assert inside
    assert inside <= weights
    expected = logits_of(expected_of(source, model))
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits_of(again), logits_of(model))
    reasons = [one["reason"] for one in result.report["kept"]]
    assert reasons.count("it chooses experts") == len(experts_in(model))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_of("qwen3_moe", tmp_path_factory.mktemp("mixture") / "model")


def change(source: Path, out: Path, tensors: dict[str, Tensor]) -> Path:
    """A copy of the model in ``source`` with other tensors."""
    shutil.copytree(source, out)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_fused_files_are_read_as_those_of_single_experts(source: Path, tmp_path: Path) -> None:
    stored = stored_tensors(source)
    fused = {name: tensor for name, tensor in stored.items() if ".experts." not in name}
    for block in range(3):
        inside = f"model.layers.{block}.mlp.experts"
        parts = {
            leaf: torch.stack([stored[f"{inside}.{n}.{leaf}.weight"] for n in range(4)])
            for leaf in ("gate_proj", "up_proj", "down_proj")
        }
        fused[f"{inside}.gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], 1)
        fused[f"{inside}.down_proj"] = parts["down_proj"]
    other = change(source, tmp_path / "fused", fused)
    plan, none = Plan.preset("rtn", bits=4, group_size=16), quantine.Calibration(samples=0)
    outs = [
        quantine.quantize(model, tmp_path / f"out-{number}", plan, none).path
        for number, model in enumerate((source, other))
    ]
    one, two = (stored_tensors(out) for out in outs)
    assert one.keys() == two.keys()
    assert all(bits_equal(one[name], two[name]) for name in one)


def test_a_missing_expert_is_named(source: Path, tmp_path: Path) -> None:
    stored = stored_tensors(source)
    del stored["model.layers.1.mlp.experts.2.up_proj.weight"]
    other = change(source, tmp_path / "less", stored)
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.1\.mlp\.experts\.2\.up_"):
        quantine.quantize(other, tmp_path / "out", Plan.preset("rtn", group_size=16))


def test_kept_experts_stay_float(source: Path, tmp_path: Path, short: quantine.Calibration) -> None:
    rules = [
        {"match": "*.experts.1.*", "method": "keep"},
        {"match": "@blocks", "method": "gptq", "bits": 4, "group_size": 16},
    ]
    out = quantine.quantize(source, tmp_path / "out", Plan.from_dict({"rules": rules}), short).path
    model, _ = quantine.load(out, arithmetic="exact")
    name = "model.layers.0.mlp.experts.1.up_proj"
    float16 = stored_tensors(source)[f"{name}.weight"].half()
    assert torch.equal(model.get_submodule(name).weight, float16.float())
    torch.testing.assert_close(logits_of(model), logits_of(expected_of(source, model)))


@pytest.mark.parametrize("true_sequential", [True, False])
def test_the_report_says_how_many_tokens_chose_each_expert(
    true_sequential: bool, source: Path, tmp_path: Path, short: quantine.Calibration
) -> None:
    plan = Plan.from_dict(
        {
            "true_sequential": true_sequential,
            "rules": [{"match": "@blocks", "method": "gptq", "bits": 4, "group_size": 16}],
        }
    )
    layers = quantine.quantize(source, tmp_path / "out", plan, short).report["layers"]
    inside = [one for one in layers if ".0.mlp.experts." in one["name"]]
    for leaf, width in (("gate_proj", 64), ("up_proj", 64), ("down_proj", 128)):
        tokens = [one["tokens"] for one in inside if one["name"].endswith(leaf)]
        borrowed = [one["tokens_borrowed"] for one in inside if one["name"].endswith(leaf)]
        assert sum(tokens) == 2 * short.samples * short.seqlen
        assert borrowed == [max(0, width - one) for one in tokens]
    assert all("tokens" not in one for one in layers if ".experts." not in one["name"])


def test_a_budget_gives_rarely_chosen_experts_fewer_bits_and_none_is_skipped(
    tmp_path: Path, text_file: Path
) -> None:
    config = specimen_config("qwen3_moe")
    config.num_experts, config.num_hidden_layers = 16, 1
    write_specimen(config, tmp_path / "model")
    choice = {"method": "spqr", "group_size": 16}
    plan = Plan.from_dict(
        {
            "bits_per_weight": 4.5,
            "choices": [{**choice, "bits": bits} for bits in (2, 3, 4, 5)],
            "rules": [{"match": "@blocks", "method": "search"}],
        }
    )
    little = quantine.Calibration(str(text_file), samples=1, seqlen=24)
    result = quantine.quantize(tmp_path / "model", tmp_path / "out", plan, little)
    inside = [one for one in result.report["layers"] if "tokens" in one]
    assert len(inside) == 3 * 16
    bits = {
        few: [one["scheme"]["bits"] for one in inside if (one["tokens"] < 2) == few]
        for few in (True, False)
    }
    assert sum(bits[True]) / len(bits[True]) < sum(bits[False]) / len(bits[False])
    unseen = [one for one in inside if one["tokens"] == 0]
    assert unseen
    assert all(0 < one["output_error"] < 0.1 for one in unseen)


def test_experts_are_not_exported(source: Path, tmp_path: Path) -> None:
    plan, none = Plan.preset("rtn", bits=4, group_size=32), quantine.Calibration(samples=0)
    out = quantine.quantize(source, tmp_path / "out", plan, none).path
    with pytest.raises(FamilyError, match=r"layers\.0\.mlp\.experts holds experts, which"):
        export(out, tmp_path / "exported", "gptq")
