"""What the files hold, by the names that vLLM asks for; and what is refused before it is read."""

from __future__ import annotations

from typing import Any

import pytest

from quantine import FormatError, Plan, PlanError
from quantine.engines.vllm.stored import Stored, missing_claims
from quantine.formats.foreign.gguf.grid_types import GRID_TYPES

SCHEME = {"format": "sparse", "bits": 4, "group_size": 16, "sym": True, "group_axis": "in"}
SCHEME |= {"scale_bits": 16, "zero_bits": 0, "stat_group_size": 16}
BLOCK = "model.layers.0"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
Q, K, V = (f"{BLOCK}.self_attn.{name}_proj" for name in "qkv")


def settings(*names: str, **more: Any) -> dict[str, Any]:
    layers = {name: {"scheme": 0, "shape": [32, 64]} for name in names}
    return {"format_version": 3, "schemes": [SCHEME], "layers": layers, **more}


def files(*names: str, **more: tuple[str, tuple[int, ...]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        found[f"{name}.codes"] = ("U8", (32, 32))
        found[f"{name}.scale"] = ("F16", (32, 4))
    return {**found, **more}


def test_matrices_of_a_fused_layer() -> None:
    weight = {f"{V}.weight": ("BF16", (32, 64)), f"{Q}.in_perm": ("I16", (64,))}
    stored = Stored.of(settings(Q, K)).with_files("llama", files(Q, K, **weight))
    found = stored.fused(f"{BLOCK}.self_attn.qkv_proj", FUSED)
    assert [matrix.name for matrix in found] == [Q, K, V]
    assert [matrix.spec is None for matrix in found] == [False, False, True]
    assert [matrix.stores_order for matrix in found] == [True, False, False]
    assert found[0].dtypes == {"codes": "U8", "scale": "F16", "in_perm": "I16"}
    assert found[2].dtypes == {"weight": "BF16"}
    assert stored.fused(f"{BLOCK}.mlp.gate_up_proj", FUSED) == []
    assert [matrix.name for matrix in stored.fused(Q, FUSED)] == [Q]


def test_a_matrix_that_is_fused_in_the_files() -> None:
    name = f"{BLOCK}.self_attn.qkv_proj"
    stored = Stored.of(settings(name)).with_files("phi3", files(name))
    assert [matrix.name for matrix in stored.fused(name, {"qkv_proj": ["qkv_proj"]})] == [name]


def test_missing_tensors_are_named() -> None:
    with pytest.raises(FormatError, match=r"self_attn\.k_proj\.scale"):
        Stored.of(settings(K)).with_files("llama", {f"{K}.codes": ("U8", (32, 32))})
    stored = Stored.of(settings(Q, K)).with_files("llama", files(Q, K))
    with pytest.raises(FormatError, match=r"v_proj.*needs for .*qkv_proj"):
        stored.fused(f"{BLOCK}.self_attn.qkv_proj", FUSED)


def test_what_vllm_destroys_while_reading_is_refused() -> None:
    name = "transformer.h.0.self_attention.query_key_value"
    stored = Stored.of(settings(name))
    with pytest.raises(PlanError, match=r"rearranges .*query_key_value of bloom"):
        stored.with_files("bloom", files(name))
    assert stored.with_files("falcon", files(name)).matrix(name) is not None


def test_rounded_inputs_are_refused_where_no_link_is_described() -> None:
    name = "transformer.h.0.self_attention.query_key_value"
    inputs = {"norm": 8, "attention": 8, "hidden": 8}
    spec = Plan.from_dict({"rules": [], "activations": inputs}).activations
    assert spec is not None
    stored = Stored.of(settings(name, activations=spec.as_dict()))
    with pytest.raises(PlanError, match="rounded activations of falcon models"):
        stored.with_files("falcon", files(name))


def test_what_is_solved_for_llama_cpp_is_refused() -> None:
    found = settings(Q)
    found["schemes"] = [{**GRID_TYPES["Q4_0"].spec.as_dict(), "format": "ggml"}]
    with pytest.raises(PlanError, match=r"q_proj was solved for llama.cpp, and is not served"):
        Stored.of(found)


def test_models_that_vllm_computes_wrongly_are_refused() -> None:
    with pytest.raises(PlanError, match="gpt_neox is not served: vLLM's own model answers"):
        Stored.of(settings(Q)).with_files("gpt_neox", files(Q))


def test_what_vllm_computes_itself_is_refused() -> None:
    with pytest.raises(PlanError, match=r"rounding of key, softmax is not.*key: 16, softmax: 16"):
        Stored.of(settings(Q, activations={"norm": 8, "key": 4, "softmax": 8}))
    assert Stored.of(settings(Q, activations={"norm": 8, "hidden": 8})).activations is not None


def test_matrices_that_vllm_holds_in_floats_are_refused() -> None:
    table = "model.decoder.embed_tokens"
    stored = Stored.of(settings(Q, table)).with_files("opt", files(Q, table))
    with pytest.raises(PlanError, match=r"OPTForCausalLM holds model\.decoder\.embed_tokens in"):
        missing_claims(stored, {Q}, "OPTForCausalLM")
    missing_claims(stored, {Q, table}, "OPTForCausalLM")


def test_damaged_descriptions_are_refused() -> None:
    with pytest.raises(FormatError, match="format version 99"):
        Stored.of({**settings(Q), "format_version": 99})


def test_orders_of_norms_become_tensors_of_matrices() -> None:
    order = {f"{BLOCK}.input_layernorm.order": ("I32", (64,))}
    more = {f"{Q}.inputs.scale": ("F32", (2,)), f"{Q}.inputs.reach": ("F32", (1,))}
    stored = Stored.of(settings(Q, K, V, activations={"norm": 8, "hidden": 4}))
    stored = stored.with_files("llama", files(Q, K, V, **order, **more))
    found = stored.fused(f"{BLOCK}.self_attn.qkv_proj", FUSED)
    assert found[0].dtypes["order"] == "I32"
    assert {"inputs.scale", "inputs.reach"} <= set(found[0].dtypes)
    assert "order" not in found[1].dtypes
    assert stored.bits_of_inputs(Q) == 8
    assert stored.bits_of_inputs(f"{BLOCK}.mlp.down_proj") == 4
    assert stored.bits_of_inputs(f"{BLOCK}.self_attn.o_proj") == 16
    assert stored.bits_of_inputs("lm_head") == 16


def renamed(stored: Stored, name: str) -> str | None:
    for pattern, new in stored.renamings().items():
        if pattern.search(name):
            return None if new is None else pattern.sub(new, name)
    return name


def test_names_before_vllm_looks_for_them() -> None:
    stored = Stored.of(settings(Q, activations={"norm": 8})).with_files("llama", files(Q))
    order = renamed(stored, f"{BLOCK}.input_layernorm.order")
    assert order == f"{Q}.order"
    assert renamed(stored, f"{BLOCK}.post_attention_layernorm.order") == (
        f"{BLOCK}.mlp.gate_proj.order"
    )
    weight = renamed(stored, f"{BLOCK}.input_layernorm.norm.weight")
    assert weight == f"{BLOCK}.input_layernorm.weight"
    for name in (Q, f"{BLOCK}.R1", f"{BLOCK}.R5"):  # of quantine_maps.safetensors
        assert renamed(stored, name) is None
    for name in (f"{Q}.codes", f"{BLOCK}.input_layernorm.weight", "model.norm.weight"):
        assert renamed(stored, name) == name


def test_names_that_vllm_swallows_are_not_used() -> None:
    # Endings that vLLM 0.32 drops, or takes for scales of the cache.
    swallowed = (".g_idx", ".kv_scale", ".q_scale", ".k_scale", ".v_scale", "_zero_point")
    from quantine.formats import FORMATS

    used = {name for layout in FORMATS.values() for name in layout.tensor_names}
    used |= {"order", *(f"inputs.{name}" for name in ("scale", "zero", "labels", "reach"))}
    assert not [name for name in used if f".q_proj.{name}".endswith(swallowed)]


def test_names_follow_those_of_the_model() -> None:
    stored = Stored.of(settings("decoder.fc1")).with_files("opt", files("decoder.fc1"))
    moved = stored.renamed(lambda name: f"model.{name}")
    found = moved.matrix("model.decoder.fc1")
    assert found is not None
    assert found.name == "decoder.fc1"
    assert set(found.dtypes) == {"codes", "scale"}
    for name in ("decoder.fc1", "model.decoder.fc1"):  # before and after vLLM has renamed it
        assert renamed(moved, name) is None
