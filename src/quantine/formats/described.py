"""What a finished directory says of its packed layers, in its configuration, report and headers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from quantine.core.arithmetic import UNSTATED
from quantine.errors import FormatError, cut
from quantine.families.family import Family
from quantine.formats import FORMATS, format_named
from quantine.formats.description import METHOD
from quantine.formats.directory import REPORT, RUN_DIRECTORY, read_json
from quantine.formats.headers import Entry
from quantine.formats.stored_config import spec_of

OF_ANY_LENGTH: Final = ("outlier_gap", "outlier_value", "col_vals", "exponent")
"""Tensors of which only the file says how long they are, if they are there: those of outliers, and
the exponent of small weights."""


def read_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a finished directory.

    Raises:
        FormatError: a run is not finished, or there is none.
        OutputError: it is damaged.
    """
    if (path / RUN_DIRECTORY).is_dir():
        raise FormatError(f"{path} is unfinished: continue it with quantize --resume")
    if not (path / "config.json").is_file():
        raise FormatError(f"{path} holds no config.json: it is not a model directory")
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise FormatError(f"{path / 'config.json'} is damaged: it holds no table")
    return config


def described(path: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of quantine's ``quantization_config``, not checked yet.

    A directory that is written for other programs has them in its report.

    Args:
        config: of `read_config`.

    Raises:
        FormatError: the directory is not quantine's, or its report is damaged.
    """
    settings = config.get("quantization_config") or {}
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method == METHOD:
        return dict(settings)
    if isinstance(method, str) and method in {
        layout.quant_method for layout in FORMATS.values() if layout.exclusive
    }:
        return _described_by_report(path)
    raise FormatError(f"{path} was not written by quantine")


def _described_by_report(path: Path) -> dict[str, Any]:
    """The fields that `described` gives, as far as the report has them."""
    if not (path / REPORT).is_file():
        raise FormatError(
            f"{path} was not written by quantine, which can load and evaluate it, but lists and "
            f"packs again only directories with a {REPORT}"
        )
    report = read_json(path / REPORT)
    try:
        schemes: list[dict[str, Any]] = []
        for layer in report["layers"]:
            if layer["scheme"] not in schemes:
                schemes.append(layer["scheme"])
        return {
            "format_version": report["format_version"],
            "arithmetic": report["plan"].get("arithmetic", UNSTATED),
            "activations": report["plan"].get("activations"),
            "schemes": schemes,
            "layers": {
                layer["name"]: {"scheme": schemes.index(layer["scheme"]), "shape": layer["shape"]}
                for layer in report["layers"]
            },
        }
    except (LookupError, TypeError, AttributeError) as error:
        raise FormatError(f"{path / REPORT} is damaged ({cut(error)}): copy it again") from error


def packed_entries(
    name: str, scheme: Mapping[str, Any], shape: Sequence[int], entries: Mapping[str, Entry]
) -> dict[str, Entry]:
    """Where the packed tensors of layer ``name`` lie, by their names in its layout.

    Args:
        scheme: of the layer, as plain values.
        shape: ``(out, in)``.
        entries: every tensor of the files, by full name.

    Raises:
        FormatError: one is missing, or together they are longer or shorter than they must be.
    """
    layout, spec = format_named(scheme["format"]), spec_of(scheme)
    out_features, in_features = shape
    names = {key: f"{name}.{key}" for key in layout.tensor_names}
    found = {key: entries[full] for key, full in names.items() if full in entries}
    for key in layout.required(spec, out_features, in_features):
        if key not in found:
            raise FormatError(f"no file holds {name}.{key}: the download may be incomplete")
    ordered = "in_perm" in found and found["in_perm"].nbytes > 0
    expected = layout.nbytes(spec, out_features, in_features, ordered)
    expected += sum(found[key].nbytes for key in OF_ANY_LENGTH if key in found)
    nbytes = sum(entry.nbytes for entry in found.values())
    if nbytes != expected:
        raise FormatError(f"{name} has {nbytes} bytes in the files, not {expected}: damaged")
    return found


def kept_linears(family: Family, kept: Mapping[str, Entry], packed: Collection[str]) -> list[str]:
    """Names of the modules that are not packed, but have a matrix to multiply with.

    In running order: what is before the blocks, each block as its family has it, the head, which is
    there also where its weight is the token table's. Headers do not tell tables of positions from
    projections around the decoder, so both are there.

    Args:
        kept: where the tensors that are not packed lie, by name.
        packed: names of the layers that are.
    """
    matrices = {
        name.removesuffix(".weight")
        for name, entry in kept.items()
        if name.endswith(".weight") and len(entry.shape) == 2
    }
    found = (matrices | {family.head}) - {family.embedding, *packed}
    return sorted(found, key=lambda name: _place(family, name))


def _place(family: Family, name: str) -> tuple[int, int, int, str]:
    """Where module ``name`` runs, to sort by: part of the model, block, and place in the block."""
    number, _, inside = name.removeprefix(f"{family.blocks}.").partition(".")
    if name.startswith(f"{family.blocks}.") and number.isdigit():
        paths = [path for group in family.groups_in(int(number)) for path in group]
        place = paths.index(inside) if inside in paths else len(paths)
        return 1, int(number), place, name
    return 2 if name == family.head else 0, 0, 0, name
