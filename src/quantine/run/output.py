"""The small files of an output directory: configuration, report, model card, tokenizer."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from quantine.calibrate.text import text_name
from quantine.core.device import device_facts
from quantine.core.spec import FLOAT16
from quantine.core.versions import computing_versions
from quantine.formats.description import FORMAT_VERSION, Description, own_config
from quantine.formats.directory import copied_files, encoded
from quantine.formats.headers import Entry
from quantine.run.card import model_card
from quantine.run.job import Job
from quantine.run.left_alone import left_alone


def report_of(job: Job, identity: dict[str, str], layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of ``quantine_report.json``; all but measured times is reproducible.

    Args:
        job: the checked request.
        identity: the result of `Job.identity`.
        layers: the entries of the quantized layers.
    """
    quantized = sum(layer["weights"] for layer in layers)
    nbytes = sum(layer["bytes"] for layer in layers)
    calibration, left = job.calibration, left_alone(job)
    stay = () if job.rotated is None else job.rotated.values_stay
    return {
        "format_version": FORMAT_VERSION,
        "versions": computing_versions(),
        "model": job.source.name,
        "family": job.family.name,
        "plan": job.plan.as_dict(),
        "calibration": {
            "source": text_name(calibration.source),
            "samples": calibration.samples,
            "seqlen": 0 if job.segments is None else job.segments.shape[1],
            "seed": calibration.seed,
            "bfloat16": calibration.bfloat16,
            "bos": job.begun(),
            **({} if calibration.shards == 1 else {"shards": calibration.shards}),
            "tokens": 0 if job.segments is None else job.segments.numel(),
        },
        "device": device_facts(job.device),
        "identity": identity,
        "layers": layers,
        "kept": [
            *(
                {"name": d.layer.name, "reason": d.reason}
                for d in job.decisions
                if d.scheme is None
            ),
            *({"name": name, "reason": job.kept_reason(name)} for name in job.other_matrices()),
        ],
        **({"left": left} if left else {}),
        **({"values_not_rotated": list(stay)} if stay else {}),
        "totals": {
            "quantized_weights": quantized,
            "quantized_bytes": nbytes,
            # Matrices that stay are stored in 16 bit.
            "bits_per_weight": nbytes * 8 / quantized if quantized else float(FLOAT16),
        },
    }


def output_files(
    job: Job, scratch: Path, report: dict[str, Any], entries: Iterable[Entry]
) -> dict[str, bytes]:
    """The content of every small file of the output but the report, by file name.

    Args:
        job: the checked request.
        scratch: a directory for temporary files.
        report: the result of `report_of`.
        entries: all tensors of the output.
    """
    files = _copied(job.source.directory)
    if job.source.gguf_file is not None:
        with tempfile.TemporaryDirectory(dir=scratch) as name:
            job.tokenizer.save_pretrained(name)
            job.model.generation_config.save_pretrained(name)
            files = _copied(Path(name))
    files["config.json"] = _config(job, describe(job, report, entries))
    files["README.md"] = encoded(model_card(report))
    return files


def _copied(directory: Path) -> dict[str, bytes]:
    """The content of the small files of a directory that an output has, too, by file name."""
    return {name: file.read_bytes() for name, file in copied_files(directory).items()}


def describe(job: Job, report: dict[str, Any], entries: Iterable[Entry]) -> Description:
    """The description of the packed layers that goes into the output's ``config.json``.

    Args:
        job: the checked request.
        report: the result of `report_of`.
        entries: all tensors of the output.
    """
    schemes: list[dict[str, Any]] = []
    layers: dict[str, dict[str, Any]] = {}
    for layer in report["layers"]:
        if layer["scheme"] not in schemes:
            schemes.append(layer["scheme"])
        scheme = schemes.index(layer["scheme"])
        layers[layer["name"]] = {"scheme": scheme, "shape": layer["shape"]}
    packed: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in layers}
    for entry in entries:
        owner, _, leaf = entry.name.rpartition(".")
        if owner in packed and leaf != "bias":
            packed[owner][leaf] = entry.shape
    kept = [name for name in job.linears() if name not in layers]
    spec = job.plan.activations
    activations = None if spec is None else spec.as_dict()
    return Description(schemes, layers, job.plan.arithmetic, activations, packed, kept)


def _config(job: Job, described: Description) -> bytes:
    """The content of ``config.json``: the source's configuration plus the packed layers."""
    config = copy.deepcopy(job.config)
    config.architectures = [type(job.model).__name__]
    if job.unties:
        config.tie_word_embeddings = False
    dtype = job.float_dtype()
    if dtype is not None or config.dtype is None:
        # Without it transformers would take the dtype of the first float it finds: a float16 scale.
        config.dtype = str(dtype or torch.float32).removeprefix("torch.")
    value = json.loads(config.to_json_string(use_diff=True))
    for name in ("_name_or_path", "transformers_weights"):  # which say where the source's were
        value.pop(name, None)
    layouts = [d.scheme.layout for d in job.decisions if d.scheme is not None]
    fields = layouts[0].config(described) if layouts else own_config(described)
    return json.dumps({**value, **fields}, indent=2, sort_keys=True).encode() + b"\n"
