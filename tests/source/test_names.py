"""What the tensors of old and of other checkpoints are to a model."""

from __future__ import annotations

import pytest

from quantine.calibrate.skeleton import skeleton
from quantine.errors import CheckpointError
from quantine.source.names import listed, match_names
from tiny_models import FAMILIES, tiny_config

LEFT_OVER = {
    "llama": [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "layers.1.self_attn.rotary_emb.inv_freq",
    ],
    "gpt2": ["h.0.attn.bias", "transformer.h.3.attn.masked_bias"],
    "neox_parallel": [
        "gpt_neox.layers.0.attention.bias",
        "gpt_neox.layers.0.attention.masked_bias",
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq",
    ],
    "falcon_old": ["transformer.h.0.self_attention.rotary_emb.inv_freq"],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bare", [False, True], ids=["whole", "bare"])
def test_every_tensor_has_its_place(family: str, bare: bool) -> None:
    model = skeleton(tiny_config(family))
    found = [
        n.removeprefix(f"{model.base_model_prefix}.") if bare else n for n in model.state_dict()
    ]
    names = match_names(model, found)
    assert names.stored.keys() == model.state_dict().keys()
    assert set(names.stored.values()) == set(found)
    assert names.unused == ()


@pytest.mark.parametrize("family", LEFT_OVER)
def test_what_older_versions_stored_is_passed_over(family: str) -> None:
    model = skeleton(tiny_config(family))
    assert match_names(model, [*model.state_dict(), *LEFT_OVER[family]]).unused == ()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "score.weight",
        "model.layers.0.mlp.up_proj.lora_A.weight",
        "model.layers.0.mlp.up_proj.bias",
        "model.layers.0.mlp.up_proj.weight_scale_inv",
    ],
)
def test_everything_else_is_unused(name: str) -> None:
    model = skeleton(tiny_config("llama"))
    assert match_names(model, [*model.state_dict(), name]).unused == (name,)


@pytest.mark.parametrize("there", ["lm_head.weight", "model.embed_tokens.weight"])
def test_either_name_of_a_tied_table_will_do(there: str) -> None:
    model = skeleton(tiny_config("llama_tied"))
    names = match_names(model, [there])
    assert names.stored == {"lm_head.weight": there, "model.embed_tokens.weight": there}


def test_a_tensor_with_two_names_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"as model\.norm\.weight and as norm\.weight"):
        match_names(skeleton(tiny_config("llama")), ["norm.weight", "model.norm.weight"])


def test_long_lists_are_cut() -> None:
    assert listed(["a"]) == "a"
    assert listed(["a", "b"]) == "a, b"
    assert listed(["a", "b", "c"]) == "a, b and others, 3 tensors in all,"
