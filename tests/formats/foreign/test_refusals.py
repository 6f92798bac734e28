"""What exports refuse, that plans refuse the same, and what is rounded instead."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import quantine
from quantine import Calibration, FormatError, OutputError, Plan, PlanError, quantize
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.formats.export import export
from quantine.formats.finished import FinishedDirectory
from quantine.formats.foreign import FOREIGN
from quantine.formats.foreign.compressed_tensors.layout import pack_matrix as pack_ct
from quantine.formats.foreign.compressed_tensors.layout import unpack_matrix as unpack_ct
from quantine.formats.foreign.engines import vllm_refusal
from quantine.formats.foreign.gguf.blocks import fitting
from quantine.formats.foreign.gguf.grid_types import GRID_TYPES, type_of
from quantine.formats.foreign.gguf.same_model import as_read
from quantine.formats.foreign.gptq.layout import pack_matrix as pack_gptq
from quantine.formats.foreign.gptq.layout import unpack_matrix as unpack_gptq
from quantine.formats.foreign.nearest import relative_error, rounded
from quantine.formats.foreign.plain import plain
from quantine.formats.foreign.refusals import refusals, refused_text
from quantine.formats.foreign.spqr.layout import Spqr
from quantine.formats.foreign.target import Matrix
from quantine.formats.imported import import_model
from quantine.formats.stored_config import spec_of
from quantine.methods.rtn import RTN
from quantine.plan.targets import check_target
from quantine.run.prepare import prepare
from samples import random_weight
from tiny_models import logits_of, tiny_config

Tiny = Callable[[str], Path]
Packed = Callable[[str, str], Path]
NONE = Calibration(samples=0)
SHAPE = (32, 256)


@st.composite
def specs(draw: st.DrawFn) -> QuantSpec:
    """Specs of all kinds that divide `SHAPE`."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from([kind.spec for kind in GRID_TYPES.values()]))
    sym = draw(st.booleans())
    return QuantSpec(
        draw(st.integers(2, 8)),
        draw(st.sampled_from([-1, 8, 16, 32])),
        sym,
        draw(st.sampled_from([16, 16, 16, 3])),
        0 if sym else draw(st.sampled_from([0, 0, 0, 3, 16])),
        16,
        draw(st.sampled_from(["in", "in", "in", "out"])),
    )


@given(specs(), st.sampled_from(["gptq", "compressed-tensors", "gguf", "spqr"]))
def test_what_is_not_refused_is_held(spec: QuantSpec, to: str) -> None:
    matrix = Matrix("l", "block", spec, *SHAPE)
    weight = random_weight(*SHAPE)
    target = FOREIGN[to]
    if target.refusal(matrix) is not None:
        near = target.nearest(matrix)
        assert near is not None
        again = Matrix("l", "block", near, *SHAPE)
        assert target.refusal(again) is None
        assert held(to, rounded(weight, near), near)
        return
    assert held(to, RTN()(weight, None, spec), spec)


def held(to: str, qtensor: QTensor, spec: QuantSpec) -> bool:
    """Whether what comes back are the same weights."""
    wanted = qtensor.dequantize()
    if to == "spqr":
        return torch.equal(Spqr().unpack(Spqr().pack(qtensor), spec, SHAPE[1]).dequantize(), wanted)
    kind_of_it = type_of(spec)
    if kind_of_it is not None:
        return to == "gguf" and torch.equal(
            kind_of_it.decode(kind_of_it.encode(qtensor)).dequantize(), wanted
        )
    matrix = plain("l", qtensor)
    if to == "gguf":
        found = fitting(matrix)
        assert found is not None
        kind, values, scale = found
        blocks = values.unflatten(1, (-1, kind.weights)).float() * scale.float().unsqueeze(2)
        return torch.equal(blocks.flatten(1), wanted)
    if to == "gptq":
        size = spec.group_length(SHAPE[1])
        ordered = matrix.group_of is not None
        tensors = pack_gptq(matrix, 2, ordered)
        back = unpack_gptq("l", tensors, spec.bits, 2, SHAPE, size, ordered)
    else:
        back = unpack_ct("l", pack_ct(matrix, spec.sym), spec, SHAPE)
    scale, zero = back.by_weight()
    return torch.equal(scale.float() * (back.codes.float() - zero.float()), wanted)


SCHEMES: tuple[dict[str, Any], ...] = (
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": 32, "sym": True},
    {"bits": 4, "group_size": 16},
    {"bits": 8, "group_size": 32, "sym": True},
    {"bits": 8, "group_size": -1},
    {"bits": 5, "group_size": 32},
    {"bits": 3, "group_size": -1, "sym": True},
    {"bits": 3, "group_size": 16, "scale_bits": 3, "zero_bits": 3, "format": "sparse"},
    {"bits": 4, "group_size": 32, "group_axis": "out"},
    {"bits": 4, "group_size": 32, "zero_bits": 16, "format": "sparse"},
    GRID_TYPES["Q5_0"].spec.as_dict(),
)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("number", range(len(SCHEMES)))
def test_plans_refuse_what_exports_refuse(
    number: int, family: str, tiny: Tiny, tmp_path: Path
) -> None:
    rules = [{"match": "@blocks", "method": "rtn", **SCHEMES[number]}]
    if number % 3 == 2:
        rules.insert(0, {"match": "@embedding", "method": "rtn", "bits": 4, "group_size": 32})
    plan = Plan.from_dict({"rules": rules})
    out = quantize(tiny(family), tmp_path / "out", plan, NONE).path
    job = prepare(tiny(family), plan, NONE)
    for target in (*FOREIGN, "vllm"):
        to, engine = ("compressed-tensors", target) if target == "vllm" else (target, None)
        refused = message(partial(check_target, target, job))
        found = message(partial(export, out, tmp_path / target, to, engine=engine))
        assert found == refused
        assert (tmp_path / target).exists() == (refused is None)
    assert {path.name for path in tmp_path.iterdir()} <= {"out", *FOREIGN, "vllm"}


def test_plans_refuse_tokenizers_that_exports_refuse(tiny: Tiny, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    path = model / "tokenizer.json"
    found = json.loads(path.read_text())
    found["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(found))
    plan = Plan.preset("rtn", bits=4, group_size=32)
    job = prepare(model, plan, NONE)
    with pytest.raises(PlanError, match=r"tokenizer.json: it splits text in a way .*Whitespace"):
        check_target("gguf", job)
    check_target("gptq", job)
    out = quantize(model, tmp_path / "out", plan, NONE).path
    with pytest.raises(FormatError, match=r"tokenizer.json: it splits text in a way .*Whitespace"):
        export(out, tmp_path / "gguf", "gguf")
    assert not (tmp_path / "gguf").exists()


def message(action: Callable[[], object]) -> str | None:
    """What an action is refused with; ``None`` if it is carried out."""
    try:
        action()
    except (FormatError, PlanError) as error:
        return str(error)
    return None


def test_outliers_and_stored_orders(tiny: Tiny, short: Calibration, tmp_path: Path) -> None:
    plan = Plan.preset("spqr", bits=3, group_size=32, outliers=0.01)
    out = quantize(tiny("llama"), tmp_path / "out", plan, short).path
    for to in ("gguf", "gptq", "compressed-tensors"):
        with pytest.raises(FormatError, match=r"self_attn.q_proj \(and 13 like it\) .*outliers"):
            export(out, tmp_path / to, to)
        job = prepare(tiny("llama"), plan, short)
        with pytest.raises(PlanError, match=r"self_attn.q_proj \(and 13 like it\) .*outliers"):
            check_target(to, job)
    ordered = Plan.preset("gptq", bits=4, group_size=32, groups="refit", act_order=True)
    out = quantize(tiny("llama"), tmp_path / "ordered", ordered, short).path
    assert any(FinishedDirectory(out).qtensor(n).in_perm is not None for n in layers_of(out))
    for to in ("gguf", "compressed-tensors"):
        with pytest.raises(FormatError, match="takes no order of columns"):
            export(out, tmp_path / to, to)
    assert not export(out, tmp_path / "gptq", "gptq").converted
    with pytest.raises(FormatError, match="g_idx"):
        export(out, tmp_path / "vllm", "gptq", engine="vllm")


def layers_of(out: Path) -> list[str]:
    return list(FinishedDirectory(out).description.layers)


@pytest.mark.parametrize("to", ["gguf", "gptq", "compressed-tensors", "spqr"])
def test_the_nearest_says_what_it_costs(
    to: str, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    out = quantize(tiny("llama"), tmp_path / "out", Plan.preset("spqr", outliers=0.01), short).path
    exported = export(out, tmp_path / to, to, nearest=True)
    floats = export(out, tmp_path / "float", "float", nearest=True, weights_of=to).path
    finished, stored = FinishedDirectory(out), quantine_free_weights(floats)
    assert exported.converted.keys() == set(layers_of(out))
    for name, said in exported.converted.items():
        found = relative_error(stored[f"{name}.weight"], finished.qtensor(name).dequantize())
        assert said["error"] == pytest.approx(found)
        assert 0 < said["error"] < 0.3


def quantine_free_weights(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def test_tables_become_floats(tiny: Tiny, tmp_path: Path) -> None:
    plan = Plan.preset("rtn", bits=4, group_size=32, arithmetic="exact").with_head(8)
    out = quantize(tiny("llama_tied"), tmp_path / "out", plan, NONE).path
    with pytest.raises(FormatError, match=r"model.embed_tokens .* no quantized token table"):
        export(out, tmp_path / "gptq", "gptq")
    exported = export(out, tmp_path / "gptq", "gptq", nearest=True)
    assert list(exported.converted) == ["model.embed_tokens"]
    assert exported.converted["model.embed_tokens"]["error"] < 1e-3
    back = import_model(exported.path, tmp_path / "back").path
    found, wanted = (
        logits_of(quantine.load(path, "float32", arithmetic="exact")[0]) for path in (back, out)
    )
    torch.testing.assert_close(found, wanted, atol=0.01, rtol=0.01)


@pytest.mark.parametrize(
    ("layout", "spec", "shape", "message"),
    [
        ("gptq", QuantSpec(4, 64, True), (64, 128), None),
        ("gptq", QuantSpec(4, 64), (64, 128), "only with sym: true"),
        ("gptq", QuantSpec(3, 64, True), (64, 128), "4 and 8 bits, not 3"),
        ("compressed-tensors", QuantSpec(4, 64), (64, 128), None),
        ("compressed-tensors", QuantSpec(4, 128, True), (64, 128), None),
        ("compressed-tensors", QuantSpec(8, 64), (64, 128), "only with sym: true"),
        ("compressed-tensors", QuantSpec(4, 16), (64, 128), "groups of -1, 32, 64, 128, not 16"),
        ("compressed-tensors", QuantSpec(4, 64), (48, 128), "multiples of 32"),
    ],
)
def test_what_vllm_refuses(
    layout: str, spec: QuantSpec, shape: tuple[int, int], message: str | None
) -> None:
    found = vllm_refusal(layout, Matrix("l", "block", spec, *shape))
    assert (found is None) == (message is None)
    if found is not None and message is not None:
        assert message in found


def test_vllm_wants_one_scheme_where_it_multiplies_once(tiny: Tiny, tmp_path: Path) -> None:
    rules = [
        {"match": "*.v_proj", "method": "rtn", "bits": 8, "sym": True, "group_size": 32},
        {"match": "@blocks", "method": "rtn", "bits": 4, "group_size": 32},
    ]
    out = quantize(tiny("llama"), tmp_path / "out", Plan.from_dict({"rules": rules}), NONE).path
    with pytest.raises(FormatError, match="computes it in one product with"):
        export(out, tmp_path / "ct", "compressed-tensors", engine="vllm")
    assert not export(out, tmp_path / "ct", "compressed-tensors").converted


GRIDS = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([-1, 8, 16, 32, 48, 64]),
    sym=st.booleans(),
)


@given(
    layout=st.sampled_from(["gptq", "compressed-tensors"]),
    specs=st.lists(GRIDS, min_size=4, max_size=4),
    outliers=st.integers(0, 3),
    kept=st.integers(0, 3),
    rows=st.sampled_from([64, 48]),
)
def test_vllm_serves_the_nearest(
    layout: str, specs: list[QuantSpec], outliers: int, kept: int, rows: int
) -> None:
    config, block = tiny_config("llama"), "model.layers.0.self_attn"
    names = [f"{block}.{name}_proj" for name in "qkvo"]
    matrices = {
        name: Matrix(name, "block", spec, rows, 192, outliers=number == outliers)
        for number, (name, spec) in enumerate(zip(names, specs, strict=True))
        if number != kept
    }
    found = {one.name: one for one in refusals(layout, "vllm", config, matrices)}
    after = {
        name: replace(matrix, spec=found[name].nearest, outliers=False) if name in found else matrix
        for name, matrix in matrices.items()
        if name not in found or found[name].nearest is not None
    }
    assert refusals(layout, "vllm", config, after) == []
    for name, one in found.items():
        if one.nearest is not None:
            assert one.nearest.bits >= matrices[name].spec.bits
    if rows == 48 or kept < 3:  # vLLM multiplies the three at once, and one is float
        assert not set(after) & set(names[:3])


def test_vllm_is_given_heads_in_floats() -> None:
    matrices = {"lm_head": Matrix("lm_head", "head", QuantSpec(4, 32, True), 64, 64)}
    (found,) = refusals("gptq", "vllm", tiny_config("llama"), matrices)
    assert found.nearest is None
    assert "Nearest that does: 16 bit" in refused_text("gptq", [found])


def test_what_vllm_does_not_serve_is_rounded_to_what_it_does(
    packed: Packed, tmp_path: Path
) -> None:
    out = packed("llama", "mixed")
    exported = export(out, tmp_path / "ct", "compressed-tensors", nearest=True, engine="vllm")
    assert exported.converted
    back = import_model(exported.path, tmp_path / "back").path
    found = {name: spec_of(FinishedDirectory(back).scheme(name)) for name in layers_of(back)}
    assert found
    assert {spec.bits for spec in found.values()} <= {4, 8}
    block = "model.layers.0.self_attn"
    assert len({found.get(f"{block}.{name}_proj") for name in "qkv"}) == 1


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gpt_neox", "vLLM's own model of type gpt_neox answers otherwise"),
        ("granite", "model types that are described .* and granite is not"),
    ],
)
def test_models_that_vllm_is_not_to_serve(model_type: str, reason: str) -> None:
    config = transformers.AutoConfig.for_model(model_type)
    with pytest.raises(FormatError, match=reason):
        refusals("gptq", "vllm", config, {})
    assert refusals("gptq", None, config, {}) == []


def test_gguf_does_not_tell_attention_scaled_by_layer() -> None:
    config = transformers.GPT2Config(scale_attn_by_inverse_layer_idx=True)
    reason = FOREIGN["gguf"].model_refusal(config)
    assert reason is not None
    assert "scale_attn_by_inverse_layer_idx" in reason
    assert FOREIGN["gguf"].model_refusal(transformers.GPT2Config()) is None


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"original_max_position_embeddings": 32, "beta_fast": 16.0},
        {"original_max_position_embeddings": 32, "attention_factor": 1.0, "beta_slow": None},
        {"truncate": True},
    ],
)
def test_gguf_tells_what_yarn_means_where_fields_are_left_out(more: dict[str, Any]) -> None:
    config = tiny_config("qwen2", rope_parameters={**YARN, **more}, max_position_embeddings=128)
    config.standardize_rope_params()
    expected, found = (
        ROPE_INIT_FUNCTIONS["yarn"](one, torch.device("cpu")) for one in (config, as_read(config))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("more", [{"mscale": 0.7, "mscale_all_dim": 1.0}, {"truncate": False}])
def test_gguf_does_not_tell_other_kinds_of_yarn(more: dict[str, Any]) -> None:
    config = tiny_config("qwen2", rope_parameters={**YARN, **more}, max_position_embeddings=128)
    with pytest.raises(FormatError, match="do not say rope_parameters"):
        as_read(config)


def test_other_requests(packed: Packed, tmp_path: Path) -> None:
    out = packed("llama", "rtn")
    with pytest.raises(PlanError, match="no layout 'onnx': give one of float, gguf"):
        export(out, tmp_path / "x", "onnx")
    with pytest.raises(PlanError, match="vllm does not read layout gguf"):
        export(out, tmp_path / "x", "gguf", engine="vllm")
    with pytest.raises(PlanError, match="layout spqr compute in float16, not bfloat16"):
        export(out, tmp_path / "x", "spqr", nearest=True, dtype=torch.bfloat16)
    with pytest.raises(PlanError, match="no target 'tgi'"):
        export(out, tmp_path / "x", "gptq", engine="tgi")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(OutputError, match="is there already"):
        export(out, tmp_path / "taken", "gptq")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_rounded_activations_are_refused(tiny: Tiny, short: Calibration, tmp_path: Path) -> None:
    plan = Plan.scheme("W4A8", method="rtn")
    job = prepare(tiny("llama"), plan, short)
    with pytest.raises(PlanError, match="rounds activations"):
        check_target("gguf", job)
    out = quantize(tiny("llama"), tmp_path / "out", plan, short).path
    with pytest.raises(FormatError, match="rounds activations"):
        export(out, tmp_path / "gguf", "gguf")


@pytest.mark.parametrize(("own", "said"), [("float32", "float16"), ("bfloat16", "float16")])
def test_engines_compute_in_a_dtype_that_holds_scales(
    own: str, said: str, packed: Packed, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(packed("llama", "rtn"), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": own}))
    for to in ("gptq", "compressed-tensors"):
        exported = export(source, tmp_path / to, to)
        assert json.loads((exported.path / "config.json").read_text())["dtype"] == said
        serve = "float16" if to == "gptq" else "float16 or float32"
        notes = [f"config.json says float16, not bfloat16, .* serve it in {serve}$"]
        assert len(exported.notes) == (1 if own == "bfloat16" else 0)
        assert all(re.match(*pair) for pair in zip(notes, exported.notes, strict=False))


def test_vllm_computes_with_gptq_in_16_bits(tiny: Tiny, tmp_path: Path) -> None:
    plan = Plan.preset("rtn", bits=4, group_size=32, sym=True)
    out = quantize(tiny("llama"), tmp_path / "out", plan, NONE).path
    with pytest.raises(PlanError, match=r"layout gptq in float16 or bfloat16, not float32: give"):
        export(out, tmp_path / "x", "gptq", engine="vllm", dtype=torch.float32)
    assert not (tmp_path / "x").exists()
    for to, engine, dtype in (
        ("gptq", "vllm", torch.bfloat16),
        ("gptq", "vllm", None),
        ("gptq", None, torch.float32),
        ("compressed-tensors", "vllm", torch.float32),
    ):
        written = export(out, tmp_path / f"{to}-{engine}-{dtype}", to, engine=engine, dtype=dtype)
        said = json.loads((written.path / "config.json").read_text())["dtype"]
        if (to, engine) == ("gptq", "vllm"):
            assert said in {"float16", "bfloat16"}
        else:
            assert said == "float32"


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors", "float"])
def test_a_missing_tokenizer_is_said(to: str, packed: Packed, tmp_path: Path) -> None:
    source = Path(shutil.copytree(packed("llama", "rtn"), tmp_path / "source"))
    (source / "tokenizer.json").unlink()
    (note,) = export(source, tmp_path / to, to).notes
    assert "no tokenizer in" in note
    assert "tokenizer.json beside the weights" in note
    assert not (tmp_path / to / "tokenizer.json").exists()
    assert not export(packed("llama", "rtn"), tmp_path / "whole", to).notes
    with pytest.raises(FormatError, match=r"tokenizer.json cannot be read"):
        export(source, tmp_path / "gguf", "gguf")


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors", "float", "gguf"])
@pytest.mark.parametrize("shape", [None, (7,)])
def test_a_directory_without_a_norm_is_refused(
    to: str, shape: tuple[int, ...] | None, packed: Packed, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(packed("llama", "rtn"), tmp_path / "source"))
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    if shape is not None:
        tensors["model.norm.weight"] = torch.ones(shape)
    save_file(tensors, file)
    with pytest.raises(FormatError, match=r"model\.norm\.weight.* is damaged"):
        export(source, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["float", "gptq"])
def test_a_dtype_that_is_asked_for_rounds(to: str, packed: Packed, tmp_path: Path) -> None:
    exported = export(packed("llama", "rtn"), tmp_path / to, to, dtype=torch.bfloat16)
    stored = quantine_free_weights(exported.path)
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert any("bfloat16 rounds" in note for note in exported.notes)
    assert bool(exported.converted) == (to == "float")
