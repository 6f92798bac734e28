"""Whether a finished directory has every tensor of the model that its ``config.json`` describes."""

from __future__ import annotations

from typing import Any

from quantine.errors import FormatError
from quantine.formats.finished import FinishedDirectory


def check_complete(finished: FinishedDirectory, bare: Any) -> None:
    """Refuse a directory that lacks a tensor of its model, or has one of another shape.

    Args:
        finished: the directory.
        bare: its ``PreTrainedModel``, on the meta device. Norms that reorder channels, and other
            modules that rounded activations replace, have tensors of other names.

    Raises:
        FormatError: names the tensor.
    """
    prefix, tied = f"{bare.base_model_prefix}.", bare.all_tied_weights_keys
    there = {f"{name}.weight" for name in finished.description.layers} | set(finished.kept)
    there |= {name.removeprefix(prefix) for name in there} | {prefix + name for name in there}
    rounds = finished.description.activations is not None
    replaced = {place for name in finished.kept for place in _places(name)} if rounds else set()
    for name, parameter in bare.named_parameters():
        if name.rpartition(".")[0] in replaced:
            continue
        if name not in there and tied.get(name) not in there:
            raise FormatError(
                f"no file in {finished.path} holds {name}: the directory is damaged, make it again"
            )
        entry = finished.kept.get(name)
        if entry is not None and entry.shape != tuple(parameter.shape):
            raise FormatError(
                f"{name} is {list(entry.shape)} in {finished.path}, but {list(parameter.shape)} in "
                "the model that config.json describes: the directory is damaged, make it again"
            )


def _places(name: str) -> list[str]:
    """The names of the modules that have the tensor ``name`` below their own tensors."""
    parts = name.split(".")[:-2]
    return [".".join(parts[: end + 1]) for end in range(len(parts))]
