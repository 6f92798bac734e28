"""Finished directories, opened and packed again without a run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantine import Calibration, FormatError, Plan, quantize
from quantine.formats import FORMATS
from quantine.formats.finished import FinishedDirectory
from quantine.formats.stored_config import spec_of
from quantine.plan.presets import PRESETS
from tiny_models import bits_equal, build, stored_tensors, tiny_config

Tiny = Callable[[str], Path]
Packed = Callable[[str, str], Path]
Made = Callable[[str], FinishedDirectory]
KEPT = "model.layers.1.mlp.up_proj"
LAYER = "model.layers.0.mlp.down_proj"


def plan_in(layout: str) -> Plan:
    """The preset spqr-faithful in a layout, with one Linear kept.

    Blocks see float inputs: else later ones would see what the layout made of outliers before.
    """
    rule = {"match": "@blocks", **PRESETS["spqr-faithful"], "format": layout}
    sequential = {"true_sequential": rule.pop("true_sequential"), "float_inputs": True}
    return Plan.from_dict({"rules": [{"match": KEPT, "method": "keep"}, rule], **sequential})


@pytest.fixture(scope="module")
def made(tiny: Tiny, short: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A tiny model in layout ``sparse`` or ``spqr``, quantized with the same calibration."""
    root = tmp_path_factory.mktemp("finished")

    def directory(layout: str) -> FinishedDirectory:
        if not (root / layout).exists():
            quantize(tiny("llama"), root / layout, plan_in(layout), short)
        return FinishedDirectory(root / layout)

    return directory


def copy_of(directory: FinishedDirectory, to: Path) -> Path:
    return Path(shutil.copytree(directory.path, to / "copy"))


def stored_as(directory: FinishedDirectory, name: str, tensors: dict[str, Tensor]) -> bool:
    """Whether the files of ``directory`` hold exactly ``tensors`` for layer ``name``."""
    stored = directory.tensors(name)
    return stored.keys() == tensors.keys() and all(
        stored[key].shape == tensors[key].shape and bits_equal(stored[key], tensors[key])
        for key in stored
    )


def repacked_all(directory: FinishedDirectory, layout: str) -> dict[str, dict[str, Tensor]]:
    return {name: directory.repacked(name, layout) for name in directory.description.layers}


def shapes_of(packed: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, tuple[int, ...]]]:
    return {name: {key: tuple(t.shape) for key, t in part.items()} for name, part in packed.items()}


def test_sparse_packed_as_spqr_is_what_a_run_writes(made: Made) -> None:
    sparse, spqr = made("sparse"), made("spqr")
    packed = repacked_all(sparse, "spqr")
    assert packed.keys() == spqr.description.layers.keys()
    assert any(part["col_vals"].numel() for part in packed.values())
    assert [n for n, part in packed.items() if not stored_as(spqr, n, part)] == []
    assert sparse.kept.keys() == spqr.kept.keys()
    for name in sparse.kept:
        found, wanted = sparse.kept_tensor(name, "spqr"), spqr.kept_tensor(name)
        assert found.dtype == torch.float16
        assert bits_equal(found, wanted)
    described = sparse.described_as("spqr", shapes_of(packed))
    assert described == spqr.description
    config = json.loads((spqr.path / "config.json").read_text())
    fields = FORMATS["spqr"].config(described)
    assert {key: config[key] for key in fields} == fields
    assert fields["quantization_config"]["modules_to_not_convert"] == [
        KEPT,
        f"{KEPT}.weight",
        "lm_head",
        "lm_head.weight",
    ]


def test_the_description_is_that_of_the_run(made: Made) -> None:
    sparse = made("sparse")
    config = json.loads((sparse.path / "config.json").read_text())
    fields = FORMATS["sparse"].config(sparse.description)
    assert {key: config[key] for key in fields} == fields
    stored = stored_tensors(sparse.path)
    named = {f"{n}.{k}" for n, part in sparse.description.packed.items() for k in part}
    assert named | sparse.kept.keys() == stored.keys()
    for name in sparse.kept:
        assert bits_equal(sparse.kept_tensor(name), stored[name])
    assert sparse.kept_tensor("model.norm.weight").dtype == torch.float32


@pytest.mark.parametrize("kind", ["gptq", "mixed"])
def test_packing_in_the_same_layout_changes_no_bit(made: Made, packed: Packed, kind: str) -> None:
    for directory in (FinishedDirectory(packed("llama", kind)), made("sparse"), made("spqr")):
        for name in directory.description.layers:
            layout = directory.scheme(name)["format"]
            assert stored_as(directory, name, directory.repacked(name, layout))
            assert stored_as(directory, name, FORMATS[layout].pack(directory.qtensor(name)))


def test_dense_fits_into_sparse_and_back(packed: Packed) -> None:
    dense = FinishedDirectory(packed("llama", "mixed"))
    for name in dense.description.layers:
        tensors = dense.repacked(name, "sparse")
        assert stored_as(dense, name, tensors)  # the same bytes under another name
    described = dense.described_as("sparse", dense.description.packed)
    assert {scheme["format"] for scheme in described.schemes} == {"sparse"}
    assert len(described.schemes) == len(dense.description.schemes)


def test_spqr_packed_as_sparse_rounds_outliers_only_if_asked(made: Made) -> None:
    spqr, layout = made("spqr"), FORMATS["sparse"]
    for name in spqr.description.layers:
        before, spec = spqr.qtensor(name), spec_of(spqr.scheme(name))
        assert before.outliers is not None
        with pytest.raises(FormatError, match=rf"{name} .*float16 only.*let outliers be rounded"):
            spqr.repacked(name, "sparse")
        tensors = spqr.repacked(name, "sparse", round_outliers=True)
        after = layout.unpack(tensors, spec, before.codes.shape[1])
        assert after.outliers is not None
        assert torch.equal(after.codes, before.codes)
        assert torch.equal(after.grid.scales(), before.grid.scales())
        assert torch.equal(after.outliers.columns, before.outliers.columns)
        assert torch.equal(after.outliers.values, before.outliers.values.half())


def test_what_a_layout_cannot_hold_is_refused_by_name(packed: Packed, made: Made) -> None:
    dense, sparse = FinishedDirectory(packed("llama", "gptq")), made("sparse")
    with pytest.raises(FormatError, match=rf"{LAYER}: format spqr .*bits=3, group_size=32.*sparse"):
        dense.repacked(LAYER, "spqr")
    with pytest.raises(FormatError, match=rf"{LAYER}: format dense .*with outliers: use .*sparse"):
        sparse.repacked(LAYER, "dense")
    with pytest.raises(FormatError, match=rf"{LAYER}: format spqr-replace is only read"):
        made("spqr").repacked(LAYER, "spqr-replace")
    with pytest.raises(FormatError, match="unknown format 'awq'"):
        sparse.repacked(LAYER, "awq")
    with pytest.raises(FormatError, match="no quantized layer 'lm_head'"):
        sparse.repacked("lm_head", "spqr")
    with pytest.raises(FormatError, match=r"proj has no tensors in format spqr: pack it"):
        sparse.described_as("spqr", {})


RTN: dict[str, Any] = {
    "method": "rtn",
    "bits": 3,
    "group_size": 16,
    "scale_bits": 3,
    "zero_bits": 3,
    "stat_group_size": 16,
    "format": "sparse",
}


@pytest.mark.parametrize(
    ("model", "match", "layer", "said"),
    [
        ("qwen2", "@blocks", "model.layers.0.self_attn.q_proj", "has a bias, which .* drop"),
        ("llama", "@head", "lm_head", "is outside of the decoder blocks"),
        ("falcon_new", "@blocks", "transformer.h.0.self_attention.dense", None),
    ],
)
def test_bias_and_place_decide_too(
    tiny: Tiny, tmp_path: Path, model: str, match: str, layer: str, said: str | None
) -> None:
    plan = Plan.from_dict({"rules": [{"match": match, **RTN}]})
    out = quantize(tiny(model), tmp_path / "out", plan, Calibration(samples=0)).path
    directory = FinishedDirectory(out)
    if said is None:
        assert directory.repacked(layer, "spqr").keys() == set(FORMATS["spqr"].tensor_names)
        return
    with pytest.raises(FormatError, match=rf"{layer} {said}.*: use format sparse"):
        directory.repacked(layer, "spqr")


def test_rounded_activations_decide_too(tiny: Tiny, short: Calibration, tmp_path: Path) -> None:
    activations = {"norm": 8, "granularity": "token"}
    plan = Plan.from_dict({"rules": [{"match": "@blocks", **RTN}], "activations": activations})
    out = FinishedDirectory(quantize(tiny("llama"), tmp_path / "out", plan, short).path)
    assert out.description.activations is not None
    assert out.description.activations.items() >= activations.items()
    with pytest.raises(FormatError, match=rf"{LAYER} is in a model with rounded activations"):
        out.repacked(LAYER, "spqr")


def test_shape_decides_too(tmp_path: Path) -> None:
    source = build(tiny_config("llama", intermediate_size=72), tmp_path / "source")
    plan = Plan.from_dict({"rules": [{"match": "*.up_proj", **RTN}]})
    out = quantize(source, tmp_path / "out", plan, Calibration(samples=0)).path
    name = "model.layers.1.mlp.up_proj"
    with pytest.raises(FormatError, match=rf"{name}: .* 16 does not divide 72 outputs: use"):
        FinishedDirectory(out).repacked(name, "spqr")


def test_a_copy_without_its_report_is_enough_for_own_layouts(made: Made, tmp_path: Path) -> None:
    for layout in ("sparse", "spqr"):
        copy = copy_of(made(layout), tmp_path / layout)
        (copy / "quantine_report.json").unlink()
        if layout == "sparse":
            assert FinishedDirectory(copy).description == made(layout).description
            continue
        with pytest.raises(FormatError, match=r"quantine_report\.json"):
            FinishedDirectory(copy)


def without(file: Path, key: str) -> None:
    tensors = load_file(file)
    del tensors[key]
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("key", ["codes", "scale_zero", "zero"])
def test_a_missing_tensor_is_refused(made: Made, tmp_path: Path, key: str) -> None:
    copy = copy_of(made("sparse"), tmp_path)
    without(copy / "model.safetensors", f"{LAYER}.{key}")
    with pytest.raises(FormatError, match=rf"no file holds {LAYER}.{key}: "):
        FinishedDirectory(copy)


def test_damage_is_refused(made: Made, tmp_path: Path) -> None:
    copy = copy_of(made("spqr"), tmp_path)
    weights, report = copy / "model.safetensors", copy / "quantine_report.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:8] + b"?" + whole[9:])
    with pytest.raises(FormatError, match=r"model\.safetensors .* header is damaged"):
        FinishedDirectory(copy)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors[f"{LAYER}.dense_weights"][3] = -1
    save_file(tensors, weights, {"format": "pt"})
    for use in ("qtensor", "repacked"):
        with pytest.raises(FormatError, match=rf"{LAYER} in .* is damaged: dense_weights"):
            getattr(FinishedDirectory(copy), use)(LAYER, *["spqr"] * (use == "repacked"))
    with pytest.raises(FormatError, match=r"no file of .* holds model\.norm\.bias"):
        FinishedDirectory(copy).kept_tensor("model.norm.bias")
    said = json.loads(report.read_text())
    del said["layers"][0]["scheme"]
    report.write_text(json.dumps(said))
    with pytest.raises(FormatError, match=r"quantine_report\.json is damaged.*scheme"):
        FinishedDirectory(copy)
    (copy / ".quantine").mkdir()
    with pytest.raises(FormatError, match="unfinished: continue it with quantize --resume"):
        FinishedDirectory(copy)


def test_a_float_model_is_refused(tiny: Tiny) -> None:
    with pytest.raises(FormatError, match="was not written by quantine"):
        FinishedDirectory(tiny("llama"))


def test_transformers_is_not_needed(made: Made) -> None:
    code = f"""
import sys
from pathlib import Path
from quantine.formats.finished import FinishedDirectory
FinishedDirectory(Path({str(made("sparse").path)!r})).repacked({LAYER!r}, "spqr")
print("transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
