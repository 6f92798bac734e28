"""What a quantized directory holds, counted from its files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from quantine.core.arithmetic import UNSTATED
from quantine.core.spec import FLOAT16
from quantine.errors import FormatError
from quantine.formats import format_named
from quantine.formats.directory import REPORT, RUN_DIRECTORY, read_json
from quantine.formats.shards import read_entries
from quantine.formats.stored_config import check_description, spec_of
from quantine.kernels import backend
from quantine.source.checkpoint import weight_files


def inventory(directory: Path) -> dict[str, Any]:
    """Layers, kept tensors, file headers, and totals; sizes in bytes, from the files.

    Returns:
        ``layers`` (name, scheme, shape, bytes, bits per weight, output error, choice, kernel),
        ``kept`` (name, dtype, bytes), ``arithmetic``, ``kernel`` (what computes with them here),
        ``totals`` (``file_bytes`` is the size of the weight files).

    Raises:
        FormatError: it is not a finished directory of quantine.
    """
    if (directory / RUN_DIRECTORY).is_dir():
        raise FormatError(f"{directory} is unfinished: continue it with quantize --resume")
    if not (directory / "config.json").is_file():
        raise FormatError(f"{directory} holds no config.json: it is not a model directory")
    config = read_json(directory / "config.json").get("quantization_config") or {}
    if config.get("quant_method") == "spqr":
        config = _described_by_report(directory)
    elif config.get("quant_method") != "quantine":
        raise FormatError(f"{directory} was not written by quantine")
    check_description(config)
    reports = _layer_reports(directory)
    files = weight_files(directory)
    entries = {entry.name: entry for file in files for entry in read_entries(file)}
    packed_names: set[str] = set()
    layers = []
    for name, layer in config["layers"].items():
        scheme = config["schemes"][layer["scheme"]]
        names = [f"{name}.{key}" for key in format_named(scheme["format"]).tensor_names]
        packed_names.update(names)
        nbytes = sum(entries[key].nbytes for key in names if key in entries)
        layout = format_named(scheme["format"])
        ordered = f"{name}.in_perm" in entries and entries[f"{name}.in_perm"].nbytes > 0
        out_features, in_features = layer["shape"]
        expected = layout.nbytes(spec_of(scheme), out_features, in_features, ordered)
        # How many outliers there are, only the file says.
        expected += sum(
            entries[k].nbytes
            for k in names
            if k in entries and k.endswith((".outlier_gap", ".outlier_value", ".col_vals"))
        )
        if nbytes != expected:
            raise FormatError(f"{name} has {nbytes} bytes in the files, not {expected}: damaged")
        layers.append(
            {
                "name": name,
                "scheme": scheme,
                "shape": layer["shape"],
                "bytes": nbytes,
                "bits_per_weight": nbytes * 8 / math.prod(layer["shape"]),
                "output_error": reports.get(name, {}).get("output_error"),
                "choice": reports.get(name, {}).get("choice"),
            }
        )
    kept = [
        {"name": entry.name, "dtype": entry.dtype, "bytes": entry.nbytes}
        for entry in entries.values()
        if entry.name not in packed_names
    ]
    return {
        "layers": layers,
        "kept": kept,
        "arithmetic": config.get("arithmetic", UNSTATED),
        "kernel": kernel(),
        "totals": _totals(layers, kept, sum(file.stat().st_size for file in files)),
    }


def kernel() -> dict[str, str]:
    """Which kernel runs packed layers here, and why."""
    native = backend.native()
    if native is None:
        return {
            "name": "reference",
            "why": "the native extension is off or missing, so PyTorch unpacks and multiplies",
        }
    return {
        "name": f"native, {native.level()}",
        "why": "the native extension multiplies few rows straight from codes, and decodes weights "
        "part by part for many",
    }


def _described_by_report(directory: Path) -> dict[str, Any]:
    """Schemes and layers of a directory whose config.json is written for other programs.

    Raises:
        FormatError: quantine did not write it, so there is no report.
    """
    if not (directory / REPORT).is_file():
        raise FormatError(
            f"{directory} was not written by quantine, which can load and evaluate it, but lists "
            f"only directories with a {REPORT}"
        )
    report = read_json(directory / REPORT)
    layers = report["layers"]
    return {
        "format_version": report["format_version"],
        "arithmetic": report["plan"].get("arithmetic", UNSTATED),
        "schemes": [layer["scheme"] for layer in layers],
        "layers": {
            layer["name"]: {"scheme": index, "shape": layer["shape"]}
            for index, layer in enumerate(layers)
        },
    }


def _layer_reports(directory: Path) -> dict[str, dict[str, Any]]:
    """The report's layers by name; a copied or re-saved directory may lack it."""
    if not (directory / REPORT).is_file():
        return {}
    return {layer["name"]: layer for layer in read_json(directory / REPORT)["layers"]}


def _totals(
    layers: list[dict[str, Any]], kept: list[dict[str, Any]], file_bytes: int
) -> dict[str, Any]:
    packed = sum(layer["bytes"] for layer in layers)
    floats = sum(tensor["bytes"] for tensor in kept)
    weights = sum(math.prod(layer["shape"]) for layer in layers)
    return {
        "quantized_weights": weights,
        "quantized_bytes": packed,
        "bits_per_weight": packed * 8 / weights if weights else float(FLOAT16),
        "kept_bytes": floats,
        "header_bytes": file_bytes - packed - floats,
        "file_bytes": file_bytes,
    }
