"""What a quantized directory holds, counted from its files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from quantine.core.spec import FLOAT16
from quantine.errors import FormatError, cut
from quantine.formats.directory import REPORT, read_json
from quantine.formats.finished import FinishedDirectory
from quantine.kernels import backend


def inventory(directory: Path) -> dict[str, Any]:
    """Layers, kept tensors, file headers, and totals; sizes in bytes, from the files.

    Returns:
        ``layers`` (name, scheme, shape, bytes, bits per weight, output error, choice; in experts
        the tokens that chose it and those borrowed; else ``None``),
        ``kept`` (name, dtype, bytes), ``arithmetic``, ``kernel`` (what computes with them here),
        ``totals`` (``file_bytes`` is the size of the weight files).

    Raises:
        FormatError: it is not a finished directory of quantine, or it is damaged, see
            `quantine.formats.finished.FinishedDirectory`.
    """
    finished = FinishedDirectory(directory)
    reports = _layer_reports(directory)
    layers = []
    for name, layer in finished.description.layers.items():
        nbytes = finished.nbytes(name)
        layers.append(
            {
                "name": name,
                "scheme": finished.scheme(name),
                "shape": layer["shape"],
                "bytes": nbytes,
                "bits_per_weight": nbytes * 8 / math.prod(layer["shape"]),
                "output_error": reports.get(name, {}).get("output_error"),
                "choice": reports.get(name, {}).get("choice"),
                "tokens": reports.get(name, {}).get("tokens"),
                "tokens_borrowed": reports.get(name, {}).get("tokens_borrowed"),
            }
        )
    kept = [
        {"name": entry.name, "dtype": entry.dtype, "bytes": entry.nbytes}
        for entry in finished.kept.values()
    ]
    return {
        "layers": layers,
        "kept": kept,
        "arithmetic": finished.description.arithmetic,
        "kernel": kernel(),
        "totals": _totals(layers, kept, sum(file.stat().st_size for file in finished.files)),
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


def _layer_reports(directory: Path) -> dict[str, dict[str, Any]]:
    """The report's layers by name; a copied or re-saved directory may lack it."""
    if not (directory / REPORT).is_file():
        return {}
    try:
        found = {layer["name"]: layer for layer in read_json(directory / REPORT)["layers"]}
        return {name: dict(layer) for name, layer in found.items()}
    except (LookupError, TypeError, ValueError) as error:
        raise FormatError(f"{directory / REPORT} is damaged ({cut(error)}): remove it") from error


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
