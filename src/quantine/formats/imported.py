"""Checkpoints of other engines as directories of quantine's, with the same numbers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from quantine.core.ambient import own_state
from quantine.core.arithmetic import DEFAULT
from quantine.core.spec import QuantSpec
from quantine.core.versions import computing_versions
from quantine.errors import CheckpointError, FormatError, shown
from quantine.formats import format_named
from quantine.formats.description import FORMAT_VERSION, Description, own_config
from quantine.formats.directory import REPORT, whole_directory, write_json
from quantine.formats.foreign.awq.read import LAYOUT as AWQ
from quantine.formats.foreign.checkpoint import SHARD_BYTES
from quantine.formats.foreign.compressed_tensors.read import LAYOUT as COMPRESSED_TENSORS
from quantine.formats.foreign.gguf.read import BITS, FLOATS, OWN, GGUFModel
from quantine.formats.foreign.gptq.read import LAYOUT as GPTQ
from quantine.formats.foreign.opened import DirectoryLayout, ForeignDirectory
from quantine.formats.foreign.target import Readable
from quantine.formats.shards import merge_parts, write_atomically, write_tensors
from quantine.formats.tokenizer_files import check_tokenizer, copy_small_files
from quantine.source.locate import locate
from quantine.source.model_source import ModelSource
from quantine.source.read_record import check_finite
from quantine.source.tensor_files import SafetensorsFiles, TensorFiles

READABLE: Final[dict[str, DirectoryLayout]] = {
    "gptq": GPTQ,
    "compressed-tensors": COMPRESSED_TENSORS,
    "awq": AWQ,
}
"""Directories of other engines that are read, by ``quant_method`` in their ``config.json``."""
METHOD: Final = "import"
"""What reports call the method of a matrix that another program quantized."""
DENSE: Final = "dense"
"""Name of the layout of codes and zero points."""
GGML: Final = "ggml"
"""Name of the layout of blocks of ggml's other types."""


@dataclass(frozen=True)
class Imported:
    """What `import_model` wrote.

    Attributes:
        path: the directory.
        layers: number of matrices with the grids that they had.
        decoded: names of matrices that are no grid of quantine's, and so became floats.
    """

    path: Path
    layers: int
    decoded: list[str]


def is_foreign(source: ModelSource) -> bool:
    """Whether ``source`` is a directory that another program quantized, and that is read here."""
    return source.gguf_file is None and source.quant_method() in READABLE


def second_rounding(source: ModelSource) -> str | None:
    """What users have to know of a source that is rounded already; ``None`` if it is not."""
    if is_foreign(source):
        kind: str | None = source.quant_method()
    elif source.gguf_file is not None:
        types = {tensor.type for part in source.gguf_parts for tensor in part.tensors}
        kind = None if types <= set(FLOATS) else "gguf"
    else:
        kind = None
    if kind is None:
        return None
    return (
        f"{source.name} is quantized already ({kind}): its weights are rounded a second time; "
        "`quantine import` keeps them where their grids allow it"
    )


def open_foreign(source: ModelSource) -> Readable:
    """Open a checkpoint of another engine.

    Raises:
        CheckpointError: it is none that is read, or damaged.
        FormatError: it is damaged, or of another version.
        FamilyError: its architecture is not covered.
    """
    if source.gguf_file is not None:
        return GGUFModel(source.directory / source.gguf_file)
    method = source.quant_method()
    if method not in READABLE:
        raise CheckpointError(
            f"{source.name} has quant_method {shown(method)}: only GGUF files and directories of "
            f"{', '.join(READABLE)} are imported"
        )
    return ForeignDirectory(source.directory, READABLE[method])


def source_files(source: ModelSource) -> TensorFiles:
    """The float weights of a model, which are decoded when they are read where they are packed.

    Raises:
        QuantineError: as for `open_foreign`; or weight files are missing or damaged.
    """
    if source.gguf_file is not None or is_foreign(source):
        return open_foreign(source)
    return SafetensorsFiles(source.directory)


@own_state()
def import_model(model: str | Path, out: str | Path) -> Imported:
    """Write a checkpoint of another engine as a directory of quantine's.

    Codes, scales and zero points stay what they are, so decoded weights are the same numbers.

    Args:
        model: where it is, see `quantine.source.locate.locate`.
        out: the directory to write, new or empty; it exists whole or not at all.

    Raises:
        QuantineError: as for `open_foreign`; no matrix is on a grid of quantine's; or a tensor or
            the tokenizer is damaged.
        OutputError: ``out`` is taken or cannot be written.
    """
    source, out = locate(model), Path(out)
    opened = open_foreign(source)
    if not opened.specs:
        types = ", ".join([*BITS, *(kind.name for kind in OWN.values())])
        raise FormatError(
            f"{source.name} holds no matrix in {types}, the types that are grids of quantine's: "
            "quantize it, as a source of floats"
        )
    if source.gguf_file is None:
        check_tokenizer(source.directory)
    with whole_directory(out) as temporary:
        packed = _write_weights(opened, temporary)
        described = _described(opened, packed)
        settings = {**opened.settings, "dtype": opened.settings.get("dtype") or "float32"}
        config = {**settings, **own_config(described)}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_atomically(temporary / "config.json", text.encode())
        _write_tokenizer(source, temporary)
        write_json(temporary / REPORT, _report(source, opened, described, packed))
    return Imported(out, len(opened.specs), list(opened.decoded))


def _write_weights(opened: Readable, out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Write all weight files; gives the packed tensors of each layer on the meta device."""
    packed: dict[str, dict[str, torch.Tensor]] = {}
    with tempfile.TemporaryDirectory(dir=out, prefix=".parts-") as scratch:
        parts: list[Path] = []
        for name in [*opened.floats, *opened.specs]:
            parts.append(Path(scratch) / f"{len(parts):06}.safetensors")
            if name not in opened.specs:
                tensor = opened.float_tensor(name)
                check_finite(name, tensor, opened.headers[name].file)
                write_tensors(parts[-1], {name: tensor.contiguous()})
                continue
            tensors = format_named(_layout(opened.specs[name])).pack(opened.qtensor(name))
            packed[name] = {key: tensor.to("meta") for key, tensor in tensors.items()}
            write_tensors(parts[-1], {f"{name}.{key}": t for key, t in tensors.items()})
        merge_parts(parts, out, SHARD_BYTES)
    return packed


def _layout(spec: QuantSpec) -> str:
    """Name of the layout of a matrix on the grid ``spec``."""
    return GGML if spec.blocked else DENSE


def _described(opened: Readable, packed: Mapping[str, Mapping[str, torch.Tensor]]) -> Description:
    schemes: list[dict[str, Any]] = []
    layers = {}
    for name, spec in opened.specs.items():
        scheme = {"method": METHOD, **spec.as_dict(), "format": _layout(spec)}
        if scheme not in schemes:
            schemes.append(scheme)
        layers[name] = {"scheme": schemes.index(scheme), "shape": list(opened.shapes[name])}
    shapes = {
        name: {key: tuple(tensor.shape) for key, tensor in part.items()}
        for name, part in packed.items()
    }
    return Description(schemes, layers, DEFAULT, None, shapes, [])


def _write_tokenizer(source: ModelSource, out: Path) -> None:
    if source.gguf_file is not None:
        source.tokenizer().save_pretrained(out)
        return
    copy_small_files(source.directory, out)


def _report(
    source: ModelSource,
    opened: Readable,
    described: Description,
    packed: Mapping[str, Mapping[str, torch.Tensor]],
) -> dict[str, Any]:
    """The content of ``quantine_report.json``: nothing was solved, so nothing was measured."""
    layers = []
    for name, layer in described.layers.items():
        rows, columns = layer["shape"]
        nbytes = sum(tensor.nbytes for tensor in packed[name].values())
        layers.append(
            {
                "name": name,
                "scheme": described.schemes[layer["scheme"]],
                "shape": layer["shape"],
                "weights": rows * columns,
                "bytes": nbytes,
                "bits_per_weight": nbytes * 8 / (rows * columns),
                "outliers": 0,
                "output_error": None,
                "weight_error": None,
                "damp": None,
                "seconds": 0.0,
            }
        )
    weights, total = (sum(layer[key] for layer in layers) for key in ("weights", "bytes"))
    return {
        "format_version": FORMAT_VERSION,
        "versions": computing_versions(),
        "model": source.name,
        "plan": {"name": f"imported from {source.quant_method() or 'gguf'}", "arithmetic": DEFAULT},
        "calibration": {"source": "unknown", "samples": 0, "seqlen": 0, "seed": 0, "tokens": 0},
        "identity": source.file_digests(),
        "layers": layers,
        "kept": [{"name": name, "reason": "on another grid there"} for name in opened.decoded],
        "totals": {
            "quantized_weights": weights,
            "quantized_bytes": total,
            "bits_per_weight": total * 8 / weights,
        },
        "run": {"seconds": 0.0, "peak_memory_bytes": 0},
    }
