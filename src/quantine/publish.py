"""What an output directory holds besides weights: configuration, report, model card."""

from __future__ import annotations

import copy
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from quantine.card import model_card
from quantine.core.spec import FLOAT16
from quantine.formats import FORMAT_VERSION
from quantine.formats.spqr import layout_of
from quantine.formats.spqr_config import ADDED, ARITHMETIC, MARK, settings_of
from quantine.prepare import NO_LAYER, Job

COPIED: Final = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Files of the source that describe its tokenizer and its way of generating."""


def report_of(job: Job, identity: dict[str, str], layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The machine-readable report; everything in it but measured times is reproducible."""
    quantized = sum(layer["weights"] for layer in layers)
    nbytes = sum(layer["bytes"] for layer in layers)
    calibration = job.calibration
    return {
        "format_version": FORMAT_VERSION,
        "versions": {name: version(name) for name in ("quantine", "torch", "transformers")},
        "model": job.source.name,
        "family": job.family.name,
        "plan": job.plan.as_dict(),
        "calibration": {
            "source": Path(calibration.source).name,
            "samples": calibration.samples,
            "seqlen": 0 if job.segments is None else job.segments.shape[1],
            "seed": calibration.seed,
            "bfloat16": calibration.bfloat16,
            "tokens": 0 if job.segments is None else job.segments.numel(),
        },
        "identity": identity,
        "layers": layers,
        "kept": [
            *(
                {"name": d.layer.name, "reason": d.reason}
                for d in job.decisions
                if d.scheme is None
            ),
            *({"name": name, "reason": NO_LAYER} for name in job.other_matrices()),
        ],
        "totals": {
            "quantized_weights": quantized,
            "quantized_bytes": nbytes,
            # Matrices that stay are stored in 16 bit.
            "bits_per_weight": nbytes * 8 / quantized if quantized else float(FLOAT16),
        },
    }


def output_files(job: Job, directory: Path, report: dict[str, Any]) -> dict[str, bytes]:
    """Every small file of the output, by name; ``directory`` is the source's."""
    files = {
        name: (directory / name).read_bytes() for name in COPIED if (directory / name).is_file()
    }
    files["config.json"] = _config(job, report)
    files["README.md"] = model_card(report).encode()
    return files


def _config(job: Job, report: dict[str, Any]) -> bytes:
    from quantine.runtime.hf import LOCK

    config = copy.deepcopy(job.config)
    config.architectures = [type(job.model).__name__]
    if job.unties:
        config.tie_word_embeddings = False
    if job.writes_spqr():  # without a lock, which would keep its other readers out
        setattr(config, MARK, ADDED)
        setattr(config, ARITHMETIC, job.plan.arithmetic)
        config.dtype = "float16"
        quantization = _spqr_settings(job, report)
    else:
        config.transformers_weights = LOCK
        if config.dtype is None:
            # Else transformers would take the dtype of the first float it finds: a float16 scale.
            config.dtype = "float32"
        quantization = _settings(job, report)
    value = json.loads(config.to_json_string(use_diff=True))
    value.pop("_name_or_path", None)
    value["quantization_config"] = quantization
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"


def _settings(job: Job, report: dict[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` of quantine's own."""
    from quantine.runtime.hf import QuantineConfig

    schemes: list[dict[str, Any]] = []
    layers: dict[str, dict[str, Any]] = {}
    for layer in report["layers"]:
        if layer["scheme"] not in schemes:
            schemes.append(layer["scheme"])
        scheme = schemes.index(layer["scheme"])
        layers[layer["name"]] = {"scheme": scheme, "shape": layer["shape"]}
    spec = job.plan.activations
    activations = None if spec is None else spec.as_dict()
    config = QuantineConfig(FORMAT_VERSION, schemes, layers, job.plan.arithmetic, activations)
    settings: dict[str, Any] = config.to_dict()
    return settings


def _spqr_settings(job: Job, report: dict[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` that other readers of format ``spqr`` need."""
    ordered = {
        d.layer.name: d.scheme.solver.stores_order(d.scheme.spec) for d in job.decisions if d.scheme
    }
    packed = {}
    for layer in report["layers"]:
        name, (rows, columns) = layer["name"], layer["shape"]
        packed[name] = layout_of(rows, columns, ordered[name], layer["outliers"])
    return settings_of(packed, [name for name in job.linears() if name not in packed])
