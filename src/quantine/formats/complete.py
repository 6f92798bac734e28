"""Whether files have every tensor of the model that their ``config.json`` describes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from quantine.errors import FormatError
from quantine.formats.finished import FinishedDirectory
from quantine.formats.headers import FLOATS, Entry


def check_complete(finished: FinishedDirectory, bare: Any) -> None:
    """Refuse a directory that lacks a tensor of its model, or has one of another shape or dtype.

    Args:
        finished: the directory.
        bare: its ``PreTrainedModel``, on the meta device. Norms that reorder channels, and other
            modules that rounded activations replace, have tensors of other names.

    Raises:
        FormatError: names the tensor.
    """
    check_kept(bare, finished.kept)
    packed = [f"{name}.weight" for name in finished.description.layers]
    rounds = finished.description.activations is not None
    replaced = {place for name in finished.kept for place in _places(name)} if rounds else set()
    for name in parameters_without(bare, [*packed, *finished.kept]):
        if name.rpartition(".")[0] not in replaced:
            raise FormatError(
                f"no file in {finished.path} holds {name}: the directory is damaged, make it again"
            )


def _places(name: str) -> list[str]:
    """The names of the modules that have the tensor ``name`` below their own tensors."""
    parts = name.split(".")[:-2]
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def parameters_without(model: Any, stored: Collection[str]) -> list[str]:
    """Names of the parameters of a ``PreTrainedModel`` for which ``stored`` names no tensor.

    A parameter is there if one that it is tied to is, with or without the prefix of the model.
    """
    prefix, tied = f"{model.base_model_prefix}.", model.all_tied_weights_keys
    there = {*stored, *(name.removeprefix(prefix) for name in stored)}
    there |= {prefix + name for name in stored}
    return [
        name
        for name, _ in model.named_parameters()
        if name not in there and tied.get(name) not in there
    ]


def check_kept(model: Any, entries: Mapping[str, Entry]) -> None:
    """Refuse tensors that are not packed if they are no floats, or not as the model has them.

    Raises:
        FormatError: names the tensor.
    """
    for name, parameter in model.named_parameters():
        entry = entries.get(name)
        if entry is None:
            continue
        if entry.shape != tuple(parameter.shape):
            raise FormatError(
                f"{name} is {list(entry.shape)} in the files, but {list(parameter.shape)} in the "
                "model that config.json describes: it is damaged"
            )
        if parameter.is_floating_point() and entry.dtype not in FLOATS:
            raise FormatError(
                f"{name} is stored as {entry.dtype}, but the model needs one of "
                f"{', '.join(sorted(FLOATS))}: it is damaged"
            )
