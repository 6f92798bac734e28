"""Rotations of models that nobody described: found, proved on a small model, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import quantine
from quantine import Calibration, FamilyError, Plan
from quantine.calibrate.skeleton import skeleton
from quantine.core.ambient import own_state
from quantine.core.transform_spec import Rotate
from quantine.families import described_family
from quantine.families.derivation.derive import Study, study
from quantine.report.tables.plan import print_plan
from quantine.rotation.derived import derived_wiring, shake_buffers
from quantine.rotation.proved import prove
from quantine.rotation.rotated import check_known, rotated
from quantine.rotation.wiring import BlockWiring, Wiring, described_wiring
from quantine.run.estimate import estimate
from quantine.run.output import report_of
from quantine.run.prepare import prepare
from quantine.survey.specimen import specimen_config, write_specimen
from quantine.tuning.student import float_model
from tiny_models import logits_of, oracle_weights, some_tokens, tiny_config, with_weights

DESCRIBED = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "opt", "neox_parallel",
    "neox_sequential", "gpt2",
)  # fmt: skip
ROTATED = (
    "olmo", "stablelm", "starcoder2", "granite", "phi", "cohere", "helium", "ernie4_5", "arcee",
    "glm", "nemotron", "persimmon", "biogpt", "codegen", "gptj", "gpt_bigcode", "seed_oss",
    "hunyuan_v1_dense", "gemma", "mpt", "gpt_neo", "mixtral", "qwen3_moe", "gpt_oss",
    "deepseek_v3", "lfm2", "qwen3_next",
)  # fmt: skip
"""Norms without weights, or with (1 + weight); biases in heads; parallel blocks; multipliers;
latent attention; experts, routers, convolutions and linear attention are among them."""
REFUSED = {
    "glm4": r"layers\.0 computes something else .* as model\.layers\.0\.post_mlp_layernorm\.weight",
    "olmo2": r"layers\.0\.self_attn\.q_proj reads hidden states that no norm before it",
    "xglm": r"a xglm model computes something else with rotated hidden states",
    "mbart": r"decoder\.layernorm_embedding",
    "openai-gpt": "0 norms run between blocks and head of openai-gpt models, not 1",
    "gemma3n_text": "gemma3n_text models are not understood",
}
PLAN = replace(Plan.preset("rtn", group_size=-1), transforms=(Rotate(),))


def untied(config: Any) -> Any:
    config.tie_word_embeddings = False
    return config


@pytest.mark.parametrize("name", DESCRIBED)
def test_what_is_described_is_found(name: str) -> None:
    config = untied(tiny_config(name))
    family, model = described_family(config.model_type), skeleton(config)
    found, described = derived_wiring(config), described_wiring(model, family, config)
    assert found.final_norm == described.final_norm
    assert set(found.tables) == set(described.tables)
    assert rotated(model, found, 3) == rotated(model, described, 3)
    named = {name for name, _ in model.named_parameters()}
    assert found.untouched == described.untouched & named


@pytest.mark.parametrize("name", ROTATED)
def test_a_rotated_model_computes_the_same(name: str, tmp_path: Path) -> None:
    write_specimen(specimen_config(name), tmp_path)
    job = prepare(tmp_path, PLAN, Calibration(samples=0))
    model: Any = float_model(job.config, job.checkpoint(), torch.device("cpu")).eval()
    plain = with_weights(tmp_path, {})
    wanted = logits_of(plain)
    assert torch.allclose(logits_of(model), wanted, atol=1e-4 * float(wanted.abs().max()))
    assert job.rotated is not None
    turned = [d.layer for d in job.decisions if f"{d.layer.name}.weight" in job.rotated.recipes]
    assert {"embedding", "head", "block"} == {layer.role for layer in turned}
    assert len(turned) > len(job.decisions) / 2
    for layer in turned[:1] + turned[-1:]:
        before = layer.read(model)
        layer.write(model, torch.zeros_like(before).copy_(original(plain, layer.name)))
        assert not torch.allclose(logits_of(model), wanted, atol=1e-2 * float(wanted.abs().max()))
        layer.write(model, before)


def original(plain: Any, name: str) -> torch.Tensor:
    weight: torch.Tensor = plain.get_submodule(name).weight
    return weight.T if type(plain.get_submodule(name)).__name__ == "Conv1D" else weight


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_proved_is_refused_by_name(name: str) -> None:
    with pytest.raises(FamilyError, match=REFUSED[name]) as caught:
        derived_wiring(untied(specimen_config(name)))
    assert str(caught.value).endswith("leave out `rotate`")


def test_sizes_of_the_whole_model_tell_apart_what_is_equally_wide_in_a_small_one() -> None:
    config = AutoConfig.for_model("mamba", num_hidden_layers=2, tie_word_embeddings=False)
    block = derived_wiring(config).blocks[0]
    assert block == BlockWiring((("norm", ("mixer.in_proj",)),), ("mixer.out_proj",), None)
    with pytest.raises(FamilyError, match=r"backbone\.layers\.0 computes something else"):
        derived_wiring(untied(specimen_config("mamba")))  # where x_proj is as wide


def test_experts_read_and_write_with_those_that_choose_them() -> None:
    block = derived_wiring(untied(specimen_config("qwen2_moe"))).blocks[0]
    fed = set(dict(block.readers)["post_attention_layernorm"])
    assert {"mlp.gate", "mlp.experts", "mlp.shared_expert_gate"} < fed
    assert set(block.writers) == {"self_attn.o_proj", "mlp.shared_expert.down_proj"}


def test_a_model_with_other_parameters_than_the_small_one_is_refused() -> None:
    config = untied(specimen_config("olmo"))
    model: Any = skeleton(config)
    wiring = derived_wiring(config)
    check_known(model, wiring, rotated(model, wiring, 0).recipes)
    model.model.layers[1].extra = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(FamilyError, match=r"layers\.1\.extra\.weight is neither"):
        check_known(model, wiring, rotated(model, wiring, 0).recipes)


def test_values_that_stay_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_specimen(specimen_config("codegen"), tmp_path)
    job = prepare(tmp_path, PLAN, Calibration(samples=0))
    assert job.rotated is not None
    assert job.rotated.values_stay == tuple(f"transformer.h.{index}" for index in range(3))
    print_plan(job, estimate(job), every_layer=False)
    printed = " ".join(capsys.readouterr().out.split())
    named = ", ".join(job.rotated.values_stay)
    assert f"not rotated: values of {named}, of which no reorder is proved" in printed
    report = report_of(job, {}, [])
    assert report["values_not_rotated"] == list(job.rotated.values_stay)


def test_stored_buffers_hide_nothing() -> None:
    model: Any = torch.nn.Module()
    model.register_buffer("scale", torch.ones(8))
    model.register_buffer("count", torch.ones(8, dtype=torch.int64))
    model.register_buffer("angles", torch.ones(8), persistent=False)
    shake_buffers(model)
    assert len(set(model.scale.tolist())) == 8
    assert bool((model.scale != 1).all())
    assert bool((model.count == 1).all())
    assert bool((model.angles == 1).all())


@pytest.fixture(scope="module")
def studied() -> Study:
    return study(untied(specimen_config("starcoder2")))


@pytest.fixture(scope="module")
def whole() -> Wiring:
    return derived_wiring(untied(specimen_config("starcoder2")))


@own_state()
def proved(studied: Study, wiring: Wiring) -> None:
    prove(studied, wiring, rotated(studied.model, wiring, 0))


def with_block(wiring: Wiring, index: int, **changes: Any) -> Wiring:
    blocks = list(wiring.blocks)
    blocks[index] = replace(blocks[index], **changes)
    return replace(wiring, blocks=tuple(blocks))


def test_every_part_of_a_wiring_is_needed(studied: Study, whole: Wiring) -> None:
    proved(studied, whole)
    proved(studied, with_block(whole, 1, values=None))  # values are turned for themselves
    block, (first, (norm, readers)) = whole.blocks[1], whole.blocks[1].readers
    values = block.values
    assert values is not None
    wrong = {
        "writer": {"writers": block.writers[:1]},
        "norm": {"readers": (first,)},
        "reader": {"readers": ((first[0], first[1][:-1]), (norm, readers))},
        "values": {"values": replace(values, producers=("self_attn.k_proj",))},
    }
    for changes in wrong.values():
        with pytest.raises(FamilyError, match=r"layers\.1 computes something else"):
            proved(studied, with_block(whole, 1, **changes))
    with pytest.raises(FamilyError, match="a starcoder2 model computes something else"):
        proved(studied, replace(whole, tables=()))


def test_a_matrix_that_may_stay_proves_nothing(whole: Wiring) -> None:
    studied = study(untied(specimen_config("starcoder2")))
    with torch.no_grad():
        studied.model.get_parameter("model.layers.2.mlp.c_fc.weight").zero_()
    with pytest.raises(FamilyError, match=r"that model\.layers\.2\.mlp\.c_fc\.weight has to be"):
        proved(studied, whole)


@pytest.mark.parametrize("name", ["gemma", "qwen3_moe"])
def test_a_derived_rotation_goes_through_the_pipeline(
    name: str, short: Calibration, tmp_path: Path
) -> None:
    write_specimen(specimen_config(name), tmp_path / "model")
    plan = Plan.from_dict(
        {
            "rules": [{"match": "@blocks", "method": "rtn", "bits": 8, "group_size": 16}],
            "transforms": ["rotate"],
            "arithmetic": "exact",
        }
    )
    out = quantine.quantize(tmp_path / "model", tmp_path / "out", plan, short).path
    model, _ = quantine.load(out)
    found, wanted = logits_of(model), logits_of(with_weights(tmp_path / "model", {}))
    assert float((found - wanted).std()) < 0.1 * float(wanted.std())
    job = prepare(tmp_path / "model", plan, short)
    dequantized: Any = float_model(job.config, job.checkpoint(), torch.device("cpu")).eval()
    for layer, weight in oracle_weights(out).items():
        dequantized.get_submodule(layer).weight = torch.nn.Parameter(weight)
    tokens = some_tokens()
    assert torch.allclose(
        logits_of(model, tokens), logits_of(dequantized, tokens), atol=2e-2 * float(found.std())
    )
