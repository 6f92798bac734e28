"""Token embedding and output head: kept by default, quantized by a rule, tied or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantine
from tiny_models import (
    VOCAB,
    bits_equal,
    build,
    logits_of,
    oracle_weights,
    stored_tensors,
    tiny_config,
    with_weights,
)

Tiny = Callable[[str], Path]

BLOCKS = {"match": "@blocks", "method": "rtn", "bits": 4, "group_size": 32}
TABLE = {"match": "@embedding", "method": "rtn", "bits": 8, "group_size": -1}
HEAD = {"match": "@head", "method": "rtn", "bits": 6, "group_size": 32, "sym": True}
SAME_HEAD = {**TABLE, "match": "@head"}
NAMES = {
    "llama": ("model.embed_tokens", "lm_head"),
    "llama_tied": ("model.embed_tokens", "lm_head"),
    "gemma2": ("model.embed_tokens", "lm_head"),
    "gpt2": ("transformer.wte", "lm_head"),
    "opt_projected": ("model.decoder.embed_tokens", "lm_head"),
    "bloom": ("transformer.word_embeddings", "lm_head"),
    "neox_parallel": ("gpt_neox.embed_in", "lm_head"),
}
TIED = ("llama_tied", "gemma2", "gpt2", "opt_projected", "bloom")
UNTIED = ("llama", "neox_parallel")


def quantized(model: Path, out: Path, *rules: dict[str, Any]) -> Path:
    """``model`` with its blocks at 4 bit and ``rules`` on top."""
    plan = quantine.Plan.from_dict({"rules": [BLOCKS, *rules], "arithmetic": "exact"})
    return quantine.quantize(model, out, plan, quantine.Calibration(samples=0)).path


def expected_model(source: Path, out: Path, name: str) -> Any:
    """The float model with the decoded weights; a table without a head of its own is the head."""
    weights = oracle_weights(out)
    table, head = NAMES[name]
    tied = json.loads((out / "config.json").read_text()).get("tie_word_embeddings", True)
    if tied and name in TIED and table in weights:
        weights[head] = weights[table]
    return with_weights(source, weights)


def check(source: Path, out: Path, name: str, copies: Path) -> Any:
    """The loaded model computes what the files say, also after it was saved again."""
    model, _ = quantine.load(out)
    logits = logits_of(model)
    torch.testing.assert_close(
        logits, logits_of(expected_model(source, out, name)), atol=2e-5, rtol=1e-5
    )
    model.save_pretrained(copies)
    model.save_pretrained(copies / "shards", max_shard_size="20KB")
    for copy in (copies, copies / "shards"):
        again, info = AutoModelForCausalLM.from_pretrained(copy, output_loading_info=True)
        assert not info["missing_keys"]
        assert bits_equal(logits_of(again.eval()), logits)
    assert stored_tensors(copies).keys() == stored_tensors(out).keys()
    return model


def table_like(out: Path) -> list[str]:
    """Tensors in the files with one row or code row for each token."""
    return sorted(
        name
        for name, tensor in stored_tensors(out).items()
        if tensor.ndim == 2 and tensor.shape[0] == VOCAB and not name.endswith(".scale")
    )


@pytest.mark.parametrize("name", TIED)
def test_a_tied_table_is_kept_once(name: str, tiny: Tiny, tmp_path: Path) -> None:
    out = quantized(tiny(name), tmp_path / "out")
    assert table_like(out) == [f"{NAMES[name][0]}.weight"]
    check(tiny(name), out, name, tmp_path / "copy")


@pytest.mark.parametrize("rules", [[TABLE], [TABLE, SAME_HEAD]], ids=["table", "table and head"])
@pytest.mark.parametrize("name", TIED)
def test_a_tied_table_is_quantized_once_for_both(
    name: str, rules: list[dict[str, Any]], tiny: Tiny, tmp_path: Path
) -> None:
    out = quantized(tiny(name), tmp_path / "out", *rules)
    assert table_like(out) == [f"{NAMES[name][0]}.codes"]
    model = check(tiny(name), out, name, tmp_path / "copy")
    assert model.config.tie_word_embeddings
    unquantized = with_weights(tiny(name), {}).get_input_embeddings()(torch.arange(9))
    looked_up = model.get_input_embeddings()(torch.arange(9))
    assert not torch.equal(looked_up, unquantized)
    assert (looked_up - unquantized).abs().max() < 0.02 * unquantized.abs().max()


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_quantized_alone_is_untied(name: str, tiny: Tiny, tmp_path: Path) -> None:
    out = quantized(tiny(name), tmp_path / "out", HEAD)
    table, head = NAMES[name]
    assert table_like(out) == [f"{head}.codes", f"{table}.weight"]
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    model = check(tiny(name), out, name, tmp_path / "copy")
    float_model = with_weights(tiny(name), {})
    rows = torch.arange(9)
    assert torch.equal(model.get_input_embeddings()(rows), float_model.get_input_embeddings()(rows))


@pytest.mark.parametrize("name", [*TIED, *UNTIED])
def test_table_and_head_may_differ(name: str, tiny: Tiny, tmp_path: Path) -> None:
    out = quantized(tiny(name), tmp_path / "out", TABLE, HEAD)
    table, head = NAMES[name]
    assert table_like(out) == sorted([f"{head}.codes", f"{table}.codes"])
    check(tiny(name), out, name, tmp_path / "copy")


@pytest.mark.parametrize("rule", [TABLE, HEAD], ids=["table", "head"])
@pytest.mark.parametrize("name", UNTIED)
def test_untied_matrices_are_independent(
    name: str, rule: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    out = quantized(tiny(name), tmp_path / "out", rule)
    table, head = NAMES[name]
    chosen = (table, head) if rule is TABLE else (head, table)
    assert table_like(out) == sorted([f"{chosen[0]}.codes", f"{chosen[1]}.weight"])
    check(tiny(name), out, name, tmp_path / "copy")


def test_later_blocks_are_calibrated_on_the_quantized_table(
    tiny: Tiny, short: quantine.Calibration, tmp_path: Path
) -> None:
    solve = {**BLOCKS, "method": "gptq"}
    coarse = {**TABLE, "bits": 2}
    for name, rules in {"plain": [solve], "coarse": [solve, coarse]}.items():
        plan = quantine.Plan.from_dict({"rules": rules})
        quantine.quantize(tiny("llama"), tmp_path / name, plan, short)
    first = "model.layers.0.self_attn.q_proj.codes"
    plain, changed = (stored_tensors(tmp_path / name)[first] for name in ("plain", "coarse"))
    assert not torch.equal(plain, changed)


@pytest.mark.parametrize("match", ["@head", "@embedding"])
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_gptq_cannot_solve_what_has_no_inputs(
    name: str, match: str, tiny: Tiny, short: quantine.Calibration, tmp_path: Path
) -> None:
    plan = quantine.Plan.from_dict({"rules": [BLOCKS, {"match": match, "method": "gptq"}]})
    with pytest.raises(quantine.PlanError, match="use method rtn"):
        quantine.quantize(tiny(name), tmp_path / "out", plan, short)
    assert not (tmp_path / "out").exists()


def test_half_precision_tables_follow_the_model(tiny: Tiny, tmp_path: Path) -> None:
    out = quantized(tiny("llama_tied"), tmp_path / "out", TABLE)
    model, _ = quantine.load(out, torch.bfloat16)
    assert model.get_input_embeddings()(torch.arange(3)).dtype == torch.bfloat16
    assert logits_of(model).dtype == torch.bfloat16
    model.to(torch.float16)
    assert model.get_input_embeddings()(torch.arange(3)).dtype == torch.float16
    assert logits_of(model).dtype == torch.float16


def test_a_table_that_overflows_float16_keeps_its_range(tmp_path: Path) -> None:
    config = tiny_config("llama")
    source = build(config, tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.get_input_embeddings().weight[7, 3] = 1e6  # beyond float16
    model.save_pretrained(source)
    out = quantized(source, tmp_path / "out")
    stored = stored_tensors(out)
    assert stored["model.embed_tokens.weight"].dtype == torch.float32
    assert stored["model.embed_tokens.weight"][7, 3] == 1e6
    assert stored["lm_head.weight"].dtype == torch.float16
