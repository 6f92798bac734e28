"""Sizes on disk: as the byte specification says, counted from file headers, exactly."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from quantine import Calibration
from quantine.formats.inventory import inventory
from quantine.plan.plan import Plan
from quantine.plan.scheme_parsing import scheme_from
from quantine.run.estimate import estimate
from quantine.run.prepare import prepare
from tiny_models import FAMILIES, stored_tensors

PackedModel = Callable[[str, str], Path]


def header_bytes(directory: Path) -> dict[str, int]:
    """Bytes of every tensor, read from the safetensors headers with nothing but `struct`."""
    sizes = {}
    for file in directory.glob("model*.safetensors"):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            sizes[name] = entry["data_offsets"][1] - entry["data_offsets"][0]
    return sizes


def specified_bytes(scheme: dict[str, Any], rows: int, columns: int) -> int:
    """Bytes of one dense layer by docs/format.md: codes, scales, zero points, input order."""
    bits, group = scheme["bits"], scheme["group_size"]
    groups = 1 if group == -1 else columns // group
    nbytes = rows * math.ceil(columns * bits / 8) + 2 * rows * groups
    if not scheme["sym"]:
        nbytes += math.ceil(rows * groups * bits / 8)
    if scheme["method"] == "gptq" and scheme["act_order"] and scheme["groups"] == "refit":
        nbytes += 2 * columns
    return nbytes


@pytest.mark.parametrize("kind", ["mixed", "gptq", "rtn"])
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_take_the_bytes_that_the_format_specifies(
    name: str, kind: str, packed: PackedModel
) -> None:
    directory = packed(name, kind)
    sizes = header_bytes(directory)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    report = json.loads((directory / "quantine_report.json").read_text())
    reported = {layer["name"]: layer["bytes"] for layer in report["layers"]}
    assert reported.keys() == config["layers"].keys()
    for layer, entry in config["layers"].items():
        scheme = config["schemes"][entry["scheme"]]
        found = sum(
            size
            for key, size in sizes.items()
            if key.startswith(f"{layer}.") and key.rpartition(".")[2] != "bias"
        )
        assert found == specified_bytes(scheme, *entry["shape"]) == reported[layer]
    total = sum(reported.values())
    weights = sum(math.prod(entry["shape"]) for entry in config["layers"].values())
    assert report["totals"]["quantized_bytes"] == total
    assert report["totals"]["bits_per_weight"] == total * 8 / weights


@pytest.mark.parametrize("name", FAMILIES)
def test_the_estimate_of_sizes_is_exact(
    name: str, packed: PackedModel, tiny: Any, short: Calibration
) -> None:
    report = json.loads((packed(name, "mixed") / "quantine_report.json").read_text())
    job = prepare(tiny(name), Plan.from_dict(report["plan"]), short)
    size = estimate(job)
    sizes = header_bytes(packed(name, "mixed"))
    assert size.packed == report["totals"]["quantized_bytes"]
    assert size.packed + size.kept == size.output == sum(sizes.values())
    for decision in job.scheme_layers():
        layer = decision.layer
        assert decision.scheme is not None
        expected = specified_bytes(decision.scheme.as_dict(), layer.out_features, layer.in_features)
        assert decision.scheme.nbytes(layer) == expected


def check_contents(directory: Path) -> dict[str, Any]:
    """`inventory` against the files."""
    found = inventory(directory)
    files = sum(file.stat().st_size for file in directory.glob("model*.safetensors"))
    totals = found["totals"]
    assert totals["file_bytes"] == files
    assert totals["quantized_bytes"] + totals["kept_bytes"] + totals["header_bytes"] == files
    assert totals["quantized_bytes"] == sum(layer["bytes"] for layer in found["layers"])
    sizes = header_bytes(directory)
    assert totals["quantized_bytes"] + totals["kept_bytes"] == sum(sizes.values())
    kept = {tensor["name"]: tensor["bytes"] for tensor in found["kept"]}
    assert all(sizes[name] == size for name, size in kept.items())
    return found


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "opt_projected"])
def test_contents_add_up_to_the_file_sizes(name: str, packed: PackedModel, tmp_path: Path) -> None:
    found = check_contents(packed(name, "mixed"))
    assert all(layer["output_error"] > 0 for layer in found["layers"])
    model = AutoModelForCausalLM.from_pretrained(packed(name, "mixed"))
    model.save_pretrained(tmp_path / "copy", max_shard_size="20KB")
    copied = check_contents(tmp_path / "copy")
    assert all(layer["output_error"] is None for layer in copied["layers"])
    assert [layer["bytes"] for layer in copied["layers"]] == [
        layer["bytes"] for layer in found["layers"]
    ]


def test_three_bits_use_three_bits(packed: PackedModel) -> None:
    directory = packed("llama", "gptq")
    codes = stored_tensors(directory)["model.layers.0.mlp.down_proj.codes"]
    assert codes.shape == (64, 96 * 3 // 8)
    layer = next(x for x in inventory(directory)["layers"] if x["name"].endswith("down_proj"))
    # 3 bits a code, and per group of 32 a scale of 16 bits and a zero point of 3.
    assert layer["bits_per_weight"] == 3 + (16 + 3) / 32


def test_the_default_grid_costs_what_the_documentation_says() -> None:
    from quantine.families.layers import Layer

    layer = Layer("any", 128, 256, "block", 0, 0)
    for bits, expected in {3: 3.296875, 4: 4.3125}.items():
        scheme = scheme_from({"method": "gptq", "bits": bits, "group_size": 64}, "test")
        assert scheme is not None
        assert scheme.nbytes(layer) * 8 / layer.weights == expected
