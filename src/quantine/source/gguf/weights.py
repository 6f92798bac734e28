"""Which tensors of a model a GGUF file holds; all must be there, and none beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantine.errors import CheckpointError
from quantine.source.gguf.header import GGUFFile
from quantine.source.gguf.rope import FREQUENCIES
from quantine.source.names import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_gguf_weights(parts: Sequence[GGUFFile], model: PreTrainedModel) -> None:
    """Compare names and shapes in GGUF files with those that the model needs.

    Args:
        parts: the result of `quantine.source.gguf.parts.read_parts`.
        model: the model of their config, whose weights may be on the meta device.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or has no place in the model.
    """
    path, said = parts[0].path, parts[0].metadata
    names = model_names(said["general.architecture"], model)
    tensors = {tensor.name: tensor for part in parts for tensor in part.tensors}
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    unknown = [name for name in tensors if name not in names and name != FREQUENCIES]
    if unknown:
        raise CheckpointError(
            f"{path} holds {listed(unknown)} for which a model of architecture "
            f"{said['general.architecture']} has no place: quantize the model it was made from"
        )
    missing = set(expected) - {names[name] for name in tensors if name in names}
    if missing:
        lost = [stored for stored, name in names.items() if name in missing]
        raise CheckpointError(
            f"{path} lacks {listed(lost or sorted(missing))}: the file is incomplete, or one part "
            "of several"
        )
    for stored, tensor in tensors.items():
        name = names.get(stored, "")
        shape = expected.get(name, tensor.shape)
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        if tensor.shape != (shape[::-1] if owner == "Conv1D" else shape):
            raise CheckpointError(
                f"{stored} in {path} has shape {tensor.shape}, but its metadata imply {shape}"
            )


def model_names(architecture: str, model: PreTrainedModel) -> dict[str, str]:
    """What the model calls each tensor, by llama.cpp's name; the names are those of ``gguf``.

    Args:
        architecture: of the file, one of `quantine.source.gguf.config.ARCHITECTURES`.
        model: of its config, whose weights may be on the meta device.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    code = next(code for code, name in MODEL_ARCH_NAMES.items() if name == architecture)
    known = get_tensor_name_map(code, model.config.num_hidden_layers)
    names: dict[str, str] = {}
    for name in model.state_dict():
        # Some are listed as the model without its head calls them.
        for listed_name in (name, name.removeprefix(f"{model.base_model_prefix}.")):
            stored = known.get_name(listed_name, (".weight", ".bias"))
            if stored is not None:
                names.setdefault(stored, name)
                break
    return names
