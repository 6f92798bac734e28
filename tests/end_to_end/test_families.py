"""Every supported architecture: quantize, load, compute, save, generate, cast."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantine
from quantine.runtime.modules import QuantLinear
from quantine.runtime.packed import packed_modules
from tiny_models import (
    FAMILIES,
    bits_equal,
    logits_of,
    matrices_of,
    oracle_weights,
    some_tokens,
    stored_tensors,
    with_weights,
)

Tiny = Callable[[str], Path]
PackedModel = Callable[[str, str], Path]
NEW_TOKENS = 6

every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
@pytest.mark.parametrize("kind", ["gptq", "rtn", "mixed"])
def test_logits_are_those_of_the_float_model_with_decoded_weights(
    name: str, kind: str, tiny: Tiny, packed: PackedModel
) -> None:
    directory = packed(name, kind)
    weights = oracle_weights(directory)
    assert sorted(weights) == sorted(matrices_of(tiny(name)))

    model, tokenizer = quantine.load(directory)
    assert sorted(name for name, _ in packed_modules(model)) == sorted(weights)
    assert all(isinstance(model.get_submodule(name), QuantLinear) for name in weights)
    logits = logits_of(model)
    torch.testing.assert_close(
        logits, logits_of(with_weights(tiny(name), weights)), atol=1e-5, rtol=1e-5
    )
    # Were the float weights used anywhere, this distance would vanish.
    assert (logits - logits_of(with_weights(tiny(name), {}))).abs().mean() > 0.02
    assert tokenizer.decode(tokenizer("abc")["input_ids"]) == "<s>abc"


@every_family
def test_gptq_leaves_less_output_error_than_rounding(
    name: str, tiny: Tiny, packed: PackedModel, short: quantine.Calibration, tmp_path: Path
) -> None:
    solved = json.loads((packed(name, "gptq") / "quantine_report.json").read_text())["layers"]
    plan = quantine.Plan.preset("rtn", bits=3, group_size=32)
    rounded = quantine.quantize(tiny(name), tmp_path / "out", plan, short).report["layers"]
    # The first group of matrices sees the same inputs in both runs.
    errors = [run[0]["output_error"] for run in (solved, rounded)]
    assert 0 < errors[0] < errors[1] < 1
    for layer in [*solved, *rounded]:
        assert 0 < layer["output_error"] < 1
        assert layer["bits_per_weight"] == layer["bytes"] * 8 / layer["weights"]
        assert layer["weights"] == layer["shape"][0] * layer["shape"][1]


@every_family
def test_save_pretrained_keeps_every_bit(name: str, packed: PackedModel, tmp_path: Path) -> None:
    source = packed(name, "mixed")
    model = AutoModelForCausalLM.from_pretrained(source)
    logits = logits_of(model.eval())
    floats = dict(model.named_parameters())
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for copy in (tmp_path / "whole", tmp_path / "shards"):
        stored, copied = stored_tensors(source), stored_tensors(copy)
        assert stored.keys() == copied.keys()
        for key, tensor in stored.items():
            # Norms and tables are saved in the dtype the model computes in, here float32.
            loaded = tensor.float() if key in floats else tensor
            assert bits_equal(copied[key], loaded), key
        again = AutoModelForCausalLM.from_pretrained(copy)
        assert bits_equal(logits_of(again.eval()), logits)


@every_family
def test_generate_takes_the_likeliest_token_each_time(name: str, packed: PackedModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed(name, "rtn")).eval()
    prompt = some_tokens(20, batch=1)
    expected = prompt
    for _ in range(NEW_TOKENS):  # the whole sequence anew each time: no cache
        likeliest = logits_of(model, expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, likeliest], 1)
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=-1,
        pad_token_id=0,
    )
    assert made.tolist() == expected.tolist()


@every_family
def test_casting_changes_activations_but_no_packed_tensor(name: str, packed: PackedModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed(name, "mixed"), dtype=torch.float32).eval()
    exact = logits_of(model)
    before = {
        (path, key): tensor.clone()
        for path, module in packed_modules(model)
        for key, tensor in module.packed_tensors().items()
    }
    for dtype, bound in ((torch.float16, 0.1), (torch.bfloat16, 0.8)):
        if dtype == torch.float16:
            # As a part of something larger: transformers refuses half() on the model itself.
            torch.nn.ModuleList([model]).half()
        else:
            model.to(dtype)
        for path, module in packed_modules(model):
            for key, tensor in module.packed_tensors().items():
                assert bits_equal(tensor, before[path, key])
        assert {p.dtype for p in model.parameters()} == {dtype}
        logits = logits_of(model)
        assert logits.dtype == dtype
        assert (logits.float() - exact).abs().mean() < bound * exact.std()


@pytest.mark.parametrize("name", ["llama_tied", "opt_projected", "gpt2"])
def test_the_bare_model_loads_and_saves_without_its_head(
    name: str, packed: PackedModel, tmp_path: Path
) -> None:
    from transformers import AutoModel

    whole = AutoModelForCausalLM.from_pretrained(packed(name, "mixed")).eval()
    with torch.no_grad():
        hidden = whole.base_model(input_ids=some_tokens()).last_hidden_state
        bare = AutoModel.from_pretrained(packed(name, "mixed")).eval()
        assert bits_equal(bare(input_ids=some_tokens()).last_hidden_state, hidden)
        bare.save_pretrained(tmp_path / "bare")
        again = AutoModel.from_pretrained(tmp_path / "bare").eval()
        assert bits_equal(again(input_ids=some_tokens()).last_hidden_state, hidden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_sources_stay_in_their_dtype(
    dtype: torch.dtype, tiny: Tiny, short: quantine.Calibration, tmp_path: Path
) -> None:
    float_model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=dtype)
    float_model.save_pretrained(tmp_path / "float")
    for file in tiny("llama").glob("tokenizer*"):
        (tmp_path / "float" / file.name).write_bytes(file.read_bytes())
    plan = quantine.Plan.preset("gptq", bits=4, group_size=32)
    quantine.quantize(tmp_path / "float", tmp_path / "out", plan, short)
    stored = stored_tensors(tmp_path / "out")
    assert stored["model.embed_tokens.weight"].dtype == dtype
    assert stored["model.norm.weight"].dtype == dtype
    model, _ = quantine.load(tmp_path / "out")
    assert model.dtype == dtype
    expected = with_weights(tmp_path / "float", oracle_weights(tmp_path / "out"), dtype)
    assert bits_equal(logits_of(model), logits_of(expected))
