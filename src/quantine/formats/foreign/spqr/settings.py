"""Reading the ``quantization_config`` of Hugging Face for ``quant_method: spqr``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantine.errors import FormatError, cut, shown
from quantine.formats.description import FORMAT_VERSION
from quantine.formats.foreign.spqr.layout import METHOD, SIZES, SPEC, Spqr
from quantine.formats.headers import Entry


def describe(
    settings: Mapping[str, Any],
    added: bool,
    entries: Mapping[str, Entry],
    linears: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """The same directory in the words of quantine's own ``quantization_config``.

    A Linear is packed where the files hold packed tensors of it. ``modules_to_not_convert``, whose
    spelling depends on who wrote it, is not needed for that.

    Args:
        settings: ``quantization_config`` of the directory.
        added: whether config.json holds the mark.
        entries: every stored tensor by name.
        linears: ``(out, in)`` of every Linear of the model, by name.

    Raises:
        FormatError: other sizes than the layout has, nothing packed, or tensors are missing or
            not of the lengths that ``settings`` gives.
    """
    for key, expected in SIZES.items():
        if settings.get(key) != expected:
            raise FormatError(
                f"quantization_config says {key} {shown(settings.get(key))}, but format spqr "
                f"is defined for {expected} only"
            )
    shapes = settings.get("shapes") or {}
    if not isinstance(shapes, Mapping):
        raise FormatError(f"quantization_config has no table of shapes, but {shown(shapes)}")
    layers = {}
    for name, shape in linears.items():
        names = [f"{name}.{key}" for key in Spqr().tensor_names]
        if any(key in entries or f"{key}.shape" in shapes for key in names):
            for key in names:
                _check_tensor(key, entries, shapes)
            layers[name] = {"scheme": 0, "shape": list(shape)}
    if not layers:
        raise FormatError("no Linear of the model has packed tensors: the weights are not there")
    layout = "spqr" if added else "spqr-replace"
    scheme = {"method": METHOD, **SPEC.as_dict(), "format": layout}
    return {"format_version": FORMAT_VERSION, "schemes": [scheme], "layers": layers}


def _check_tensor(name: str, entries: Mapping[str, Entry], shapes: Mapping[str, Any]) -> None:
    """Refuse a tensor that is missing, or has another length than ``shapes`` says."""
    if name not in entries:
        raise FormatError(f"no file holds {name}: the download may be incomplete")
    found, said = list(entries[name].shape), shapes.get(f"{name}.shape")
    if len(found) != 1 or said not in (None, *found):
        raise FormatError(
            f"{name} has shape {found}, but quantization_config.shapes says {cut(said)}: the files "
            "do not belong together"
        )
