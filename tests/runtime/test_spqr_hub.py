"""Directories with ``quant_method: spqr``, of other programs and of quantine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantine
from quantine import Calibration, FormatError, Plan, PlanError
from quantine.errors import CheckpointError
from quantine.formats import FORMATS
from quantine.formats.foreign.spqr.layout import SPEC
from quantine.formats.inventory import inventory
from quantine.run.quantize import quantize
from quantine.runtime.modules import QuantLinear
from quantine.runtime.packed import packed_modules
from samples import FAITHFUL, correlated_inputs, observed
from tiny_models import (
    build,
    byte_tokenizer,
    logits_of,
    matrices_of,
    stored_tensors,
    tiny_config,
    with_weights,
)

Tiny = Callable[[str], Path]
RULE: dict[str, Any] = {
    "match": "@blocks",
    "method": "spqr",
    "format": "spqr",
    "bits": 3,
    "group_size": 16,
    "scale_bits": 3,
    "zero_bits": 3,
    "stat_group_size": 16,
    "groups": "refit",
    "threshold": 0.5,
}
NEW, OLD = ["lm_head"], ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
KEYS = ("dense_weights", "row_offsets", "col_vals", "in_perm")


def padded(tensors: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The outliers of a matrix in PTCSR."""
    ends, words = tensors["row_offsets"].tolist(), tensors["col_vals"].tolist()
    split = [words[ends[r] : ends[r + 1]] for r in range(rows)]
    offsets, found = [0], []
    for start in range(0, rows, 16):
        tile = split[start : start + 16]
        for k in range(max(map(len, tile))):
            found += [row[k] if k < len(row) else 0 for row in tile]
        offsets.append(len(found))
    kinds = {"row_offsets": offsets, "col_vals": found}
    return tensors | {k: torch.tensor(v, dtype=torch.int32) for k, v in kinds.items()}


def write_checkpoint(
    source: Path, out: Path, kept: list[str], *, added: bool = False, ptcsr: bool = False
) -> dict[str, Tensor]:
    """A directory as the authors' converter writes it; the weights it stands for, by layer."""
    layout = FORMATS["spqr" if added else "spqr-replace"]
    tensors = {name: t.half() for name, t in stored_tensors(source).items()}
    weights, shapes = {}, {}
    for name in matrices_of(source):
        weight = tensors.pop(f"{name}.weight").float()
        solved = FAITHFUL(weight, observed(correlated_inputs(weight.shape[1], 200)), SPEC)
        packed = layout.pack(solved)
        weights[name] = layout.unpack(packed, SPEC, weight.shape[1]).dequantize()
        for key, tensor in (padded(packed, len(weight)) if ptcsr else packed).items():
            tensors[f"{name}.{key}"] = tensor
            shapes[f"{name}.{key}.shape"] = len(tensor)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = "float16"
    config["quantization_config"] = {
        "quant_method": "spqr",
        "bits": 3,
        "beta1": 16,
        "beta2": 16,
        "modules_to_not_convert": kept,
        "shapes": shapes,
    }
    if added:
        config["spqr_outliers"] = "added"
    (out / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(out)
    return weights


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of another program, for tests that damage copies of it."""
    out = tmp_path_factory.mktemp("hub") / "model"
    write_checkpoint(tiny("llama"), out, NEW)
    return out


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture(scope="module")
def written(tiny: Tiny, short: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that quantine wrote, with one Linear kept."""
    rules = [{"match": "*.1.mlp.up_proj", "method": "keep"}, RULE]
    plan = Plan.from_dict({"rules": rules})
    return quantize(tiny("llama"), tmp_path_factory.mktemp("own") / "out", plan, short).path


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("kept", [NEW, OLD, None])
@pytest.mark.parametrize("added", [False, True])
def test_a_checkpoint_computes_what_its_weights_say(
    tiny: Tiny, tmp_path: Path, added: bool, kept: list[str]
) -> None:
    weights = write_checkpoint(tiny("llama"), tmp_path / "hub", kept, added=added)
    model, tokenizer = quantine.load(tmp_path / "hub", dtype=torch.float32)
    packed = dict(packed_modules(model))
    assert packed.keys() == weights.keys()
    assert all(isinstance(module, QuantLinear) for module in packed.values())
    assert tokenizer("a")["input_ids"]
    assert torch.equal(logits_of(model), logits_of(with_weights(tiny("llama"), weights)))


def test_the_two_meanings_of_the_same_tensors_differ(checkpoint: Path, copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text()) | {"spqr_outliers": "added"}
    (copied / "config.json").write_text(json.dumps(config))
    replaced, _ = quantine.load(checkpoint, dtype=torch.float32)
    added, _ = quantine.load(copied, dtype=torch.float32)
    assert not torch.equal(logits_of(replaced), logits_of(added))


def test_padded_rows_and_a_tied_head(tiny: Tiny, tmp_path: Path) -> None:
    weights = write_checkpoint(tiny("llama_tied"), tmp_path / "hub", NEW, ptcsr=True)
    model, _ = quantine.load(tmp_path / "hub", dtype=torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    assert len(layer.row_offsets) == layer.out_features // 16 + 1
    assert torch.equal(logits_of(model), logits_of(with_weights(tiny("llama_tied"), weights)))


def test_biases_are_loaded_where_the_model_has_them(tmp_path: Path) -> None:
    source = build(tiny_config("qwen2"), tmp_path / "source")
    weights = write_checkpoint(source, tmp_path / "hub", NEW)
    model, _ = quantine.load(tmp_path / "hub", dtype=torch.float32)
    assert model.model.layers[0].self_attn.q_proj.bias.abs().max() > 0
    assert torch.equal(logits_of(model), logits_of(with_weights(source, weights)))


def test_dtypes(checkpoint: Path) -> None:
    exact, _ = quantine.load(checkpoint, dtype=torch.float32)
    auto, _ = quantine.load(checkpoint)
    assert auto.dtype == torch.float16
    assert (logits_of(auto).float() - logits_of(exact)).abs().max() < 0.05
    cast, _ = quantine.load(checkpoint, dtype="bfloat16")
    assert cast.dtype == torch.bfloat16
    assert cast.model.layers[0].mlp.up_proj.dense_weights.dtype == torch.int64


def test_it_can_be_evaluated_generated_from_and_saved(
    checkpoint: Path, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from quantine.cli import main

    scores = quantine.evaluate(checkpoint, str(text_file), window=32, limit=2)
    assert scores["texts"][text_file.name]["perplexity"] > 1
    tensors = load_file(checkpoint / "model.safetensors")
    nbytes = sum(t.nbytes for name, t in tensors.items() if name.split(".")[-1] in KEYS)
    weights = 16 * sum(len(t) for name, t in tensors.items() if name.endswith("dense_weights"))
    assert scores["bits_per_weight"] == pytest.approx(8 * nbytes / weights)
    assert main(["generate", str(checkpoint), "Line", "--tokens", "3"]) in {0, None}
    assert capsys.readouterr().out
    model, tokenizer = quantine.load(checkpoint, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, _ = quantine.load(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits_of(again), logits_of(model))


def test_it_is_no_source(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="already quantized"):
        quantine.quantize(checkpoint, checkpoint.parent / "out", Plan.preset("rtn"))


def test_only_own_directories_are_listed(checkpoint: Path, written: Path) -> None:
    with pytest.raises(FormatError, match=r"not written by quantine.*quantine_report\.json"):
        inventory(checkpoint)
    found = inventory(written)
    report = json.loads((written / "quantine_report.json").read_text())
    assert found["totals"]["quantized_bytes"] == report["totals"]["quantized_bytes"]
    assert {layer["scheme"]["format"] for layer in found["layers"]} == {"spqr"}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("promised", [True, False])
def test_missing_tensors_are_refused(copied: Path, key: str, promised: bool) -> None:
    tensors = load_file(copied / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{key}"]
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    if not promised:
        change_config(copied, shapes={})
    with pytest.raises(FormatError, match=rf"no file holds model.layers.1.mlp.up_proj.{key}"):
        quantine.load(copied)


def test_missing_and_surplus_layers_are_refused(copied: Path) -> None:
    change_config(copied, shapes={})
    tensors = load_file(copied / "model.safetensors")
    layer = "model.layers.1.mlp.up_proj"
    without = {name: t for name, t in tensors.items() if not name.startswith(layer)}
    save_file(without, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=rf"no file holds {layer}.weight"):
        quantine.load(copied)
    more = {f"model.extra.{key}": tensors[f"{layer}.{key}"].clone() for key in KEYS}
    save_file(tensors | more, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"files hold model\.extra"):
        quantine.load(copied)
    plain = {n: t for n, t in tensors.items() if n.split(".")[-1] not in KEYS}
    save_file(plain, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match="no Linear of the model has packed tensors"):
        quantine.load(copied)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 4}, "says bits 4, but .* 3 only"),
        ({"beta1": 32}, "says beta1 32, but .* 16 only"),
        ({"beta2": None}, "says beta2 None"),
        ({"shapes": [1]}, "no table of shapes"),
        ({"shapes": {"model.layers.0.mlp.up_proj.col_vals.shape": 1}}, "do not belong together"),
    ],
)
def test_other_sizes_are_refused(copied: Path, changes: dict[str, Any], said: str) -> None:
    change_config(copied, **changes)
    with pytest.raises(FormatError, match=said):
        quantine.load(copied)


def test_written_config_is_what_other_readers_need(written: Path) -> None:
    from transformers.utils.quantization_config import SpQRConfig

    config = json.loads((written / "config.json").read_text())
    settings = config["quantization_config"]
    assert SpQRConfig.from_dict(settings).to_dict().keys() >= settings.keys()
    assert config["dtype"] == "float16"
    assert config["spqr_outliers"] == "added"
    assert "transformers_weights" not in config
    kept = ["model.layers.1.mlp.up_proj", "lm_head"]
    both = {name for module in kept for name in (module, f"{module}.weight")}
    assert set(settings["modules_to_not_convert"]) == both
    tensors = stored_tensors(written)
    packed = {n: t for n, t in tensors.items() if n.split(".")[-1] in KEYS}
    assert settings["shapes"] == {f"{name}.shape": len(t) for name, t in packed.items()}
    assert all(t.dtype == torch.float16 for n, t in tensors.items() if n not in packed)
    assert len(packed) == 4 * (len(matrices_of(written)) - 1)
    card = (written / "README.md").read_text()
    assert "quant_method: spqr" in card
    assert "from_pretrained" not in card


def test_written_weights_are_those_that_ran(tiny: Tiny, written: Path) -> None:
    model, _ = quantine.load(written, torch.float32, "exact")
    weights = {name: module.dequantize() for name, module in packed_modules(model)}
    layers = json.loads((written / "quantine_report.json").read_text())["layers"]
    source = stored_tensors(tiny("llama"))
    assert {layer["name"] for layer in layers} == weights.keys()
    assert sum(layer["outliers"] for layer in layers) > 50
    for layer in layers:
        weight = source[f"{layer['name']}.weight"]
        error = (weights[layer["name"]] - weight).square().sum() / weight.square().sum()
        assert layer["weight_error"] == pytest.approx(float(error), rel=1e-5)
        assert layer["output_error"] < 0.01
        stored = model.get_submodule(layer["name"]).packed_tensors()
        assert layer["bytes"] == sum(t.nbytes for t in stored.values())
        assert layer["outliers"] == len(stored["col_vals"])
    reference = with_weights(tiny("llama"), weights)
    for module in reference.modules():  # norms are stored in float16
        for parameter in module.parameters(recurse=False):
            parameter.data = (
                parameter.data.half().float() if parameter.ndim == 1 else parameter.data
            )
    assert torch.equal(logits_of(model), logits_of(reference))


def test_the_layout_costs_nothing_but_the_rounding_of_outliers(
    tiny: Tiny, short: Calibration, written: Path, tmp_path: Path
) -> None:
    rules = [{"match": "*.1.mlp.up_proj", "method": "keep"}, RULE | {"format": "sparse"}]
    other = quantize(tiny("llama"), tmp_path / "sparse", Plan.from_dict({"rules": rules}), short)
    layers = json.loads((written / "quantine_report.json").read_text())["layers"]
    for layer, sparse in zip(layers, other.report["layers"], strict=True):
        assert layer["output_error"] == pytest.approx(sparse["output_error"], rel=0.1)
    first, _ = quantine.load(written)
    second, _ = quantine.load(other.path)
    packed = zip(packed_modules(first), packed_modules(second), strict=True)
    (name, ours), (_, theirs) = next(packed)
    assert name == "model.layers.0.self_attn.q_proj"
    difference = (ours.dequantize() - theirs.dequantize()).abs()
    assert 0 < (difference > 0).sum() <= layers[0]["outliers"]
    assert difference.max() < 2.0**-11


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([{"match": "*.0.*", "method": "rtn", "group_size": 16}, RULE], "hold nothing else"),
        ([RULE, {"match": "@head", "method": "rtn", "group_size": 16}], "lm_head has format"),
        ([RULE | {"bits": 4}], "cannot hold what is asked for; 'sparse' can"),
        ([RULE | {"format": "spqr-replace"}], "cannot hold what is asked for"),
    ],
)
def test_plans_that_the_directory_cannot_describe_are_refused(
    tiny: Tiny, tmp_path: Path, short: Calibration, rules: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(PlanError, match=said):
        quantine.quantize(tiny("llama"), tmp_path / "o", Plan.from_dict({"rules": rules}), short)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [("qwen2", "q_proj has a bias.*format sparse"), ("gpt2", "c_attn is a Conv1D")],
)
def test_models_that_the_directory_cannot_describe_are_refused(
    tiny: Tiny, tmp_path: Path, short: Calibration, name: str, said: str
) -> None:
    with pytest.raises(PlanError, match=said):
        quantine.quantize(tiny(name), tmp_path / "o", Plan.from_dict({"rules": [RULE]}), short)


@pytest.mark.parametrize("role", ["head", "embedding"])
def test_tables_are_refused(tmp_path: Path, short: Calibration, role: str) -> None:
    source = build(tiny_config("llama", vocab_size=304), tmp_path / "source")
    rounded = {k: v for k, v in RULE.items() if k not in {"groups", "threshold"}}
    rules = [RULE, rounded | {"match": f"@{role}", "method": "rtn"}]
    with pytest.raises(PlanError, match=f"is the {role}, but.*keep this layer"):
        quantine.quantize(source, tmp_path / "o", Plan.from_dict({"rules": rules}), short)


def test_shapes_are_refused_with_the_layer_and_the_rule(tmp_path: Path, short: Calibration) -> None:
    source = build(tiny_config("llama", intermediate_size=104), tmp_path / "source")
    rules = [{"match": "*.down_proj", "method": "keep"}, RULE]
    said = r"layers\.0\.mlp\.gate_proj: .*16 does not divide 104 outputs.*\(rule 2: @blocks\)"
    with pytest.raises(PlanError, match=said):
        quantine.quantize(source, tmp_path / "o", Plan.from_dict({"rules": rules}), short)
