"""Reading GGUF files: blocks that are grids of quantine's as they are, all else as floats."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from quantine.core.grid import Grid
from quantine.core.permute import inverse
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.errors import FormatError
from quantine.families import family_of
from quantine.families.layers import find_layers, is_transposed
from quantine.formats.foreign.gguf.arrange import row_order
from quantine.formats.foreign.gguf.block_parts import as_halves
from quantine.formats.foreign.gguf.blocks import TYPES, BlockType
from quantine.formats.foreign.gguf.grid_types import GRID_TYPES, GridType
from quantine.source.gguf.config import HEAD, gguf_config
from quantine.source.gguf.header import GGUFTensor
from quantine.source.gguf.parts import read_parts
from quantine.source.gguf.weights import check_gguf_weights, model_names
from quantine.source.model_source import ModelSource
from quantine.source.tensor_files import Header, Part

PACKED: Final = {kind.code: kind for kind in TYPES}
"""Types of one scale, by code: their matrices are stored as codes and zero points."""
OWN: Final = {kind.code: kind for kind in GRID_TYPES.values() if kind.code not in PACKED}
"""The other types that are grids, by code: their matrices stay the blocks that they are."""
FLOATS: Final = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Types of floats by code."""
AT_ONCE: Final = 2**19
"""Weights that are decoded at once, and so are in memory in several forms."""
BITS: Final = {"Q2_0": 2, "Q4_0": 4, "Q5_0": 5, "Q8_0": 8}
"""Bits of a code of each."""


class GGUFModel:
    """A GGUF file, see `quantine.formats.foreign.target.Readable`.

    Args:
        path: of the file, or of one of several.

    Attributes:
        settings: ``config.json`` of the float model, as plain values.
        specs: the grid of each matrix whose type is one of quantine's grids.
        shapes: ``(out, in)`` of each.
        floats: names of the other tensors.
        decoded: names of the layers among these that are packed, but on no grid of quantine's.
        model: of its configuration, without weights.
        directory: that holds the file.
        headers: of all tensors in float32, see `read`.

    Raises:
        CheckpointError: the file is damaged, ends early, or says what is not understood.
        FamilyError: the architecture is not read.
    """

    def __init__(self, path: Path) -> None:
        parts = read_parts(path)
        self._config = gguf_config(parts)
        self.model: nn.Module = ModelSource(str(path), path.parent).bare_model(self._config)
        check_gguf_weights(parts, self.model)
        self.settings: Mapping[str, Any] = {
            **json.loads(self._config.to_json_string(use_diff=True)),
            "architectures": [type(self.model).__name__],
        }
        stored = model_names(parts[0].metadata["general.architecture"], self.model)
        if self._config.tie_word_embeddings:  # the head, if it is there, is the table once more
            stored.pop(HEAD, None)
        tensors = [tensor for part in parts for tensor in part.tensors if tensor.name in stored]
        self._tensors = {stored[tensor.name]: tensor for tensor in tensors}
        layers = find_layers(self.model, family_of(self._config))
        self.specs: dict[str, QuantSpec] = {}
        self._own: dict[str, GridType] = {}
        for layer in layers:
            tensor = self._tensors.get(f"{layer.name}.weight")
            own = None if tensor is None else _own_type(tensor)
            if own is not None:
                self._own[layer.name], self.specs[layer.name] = own, own.spec
            elif tensor is not None and tensor.type in PACKED:
                kind = PACKED[tensor.type]
                self.specs[layer.name] = QuantSpec(BITS[kind.name], kind.weights, kind.high == 127)
        packed = {f"{name}.weight" for name in self.specs}
        self.shapes = {
            layer.name: (layer.out_features, layer.in_features)
            for layer in layers
            if layer.name in self.specs
        }
        self.floats = [name for name in self._tensors if name not in packed]
        self.decoded = [
            layer.name
            for layer in layers
            if layer.name not in self.specs
            and f"{layer.name}.weight" in self._tensors
            and self._tensors[f"{layer.name}.weight"].type not in FLOATS
        ]
        self.directory = path.parent
        self.headers = {
            name: Header(self._shape(name), "F32", tensor.file)
            for name, tensor in self._tensors.items()
        }

    def read(self, wanted: Sequence[tuple[str, Part]]) -> list[Tensor]:
        """Any tensors in float32: the weights of the model, whatever their types.

        Raises:
            CheckpointError: a file cannot be read, or ends early.
        """
        found = []
        for name, part in wanted:
            whole = self._in_model(name, _float32(self._tensors[name]))
            found.append(whole if part is None else whole[part])
        return found

    def is_transposed(self, name: str) -> bool:
        """Whether the model stores the weight of layer ``name`` as ``[in, out]``."""
        return is_transposed(self.model.get_submodule(name))

    def qtensor(self, name: str) -> QTensor:
        """The matrix of layer ``name``.

        Raises:
            FormatError: a scale is not finite.
        """
        tensor = self._tensors[f"{name}.weight"]
        rows = _data(tensor).reshape(tensor.shape[0], -1)
        order = row_order(tensor.name, len(rows), self._config)
        rows = rows if order is None else rows[inverse(order)]
        if name in self._own:
            try:
                self._own[name].check_statistics(rows)
            except FormatError as error:
                raise FormatError(f"{tensor.name} in {tensor.file}: {error}") from error
            return self._own[name].decode(rows)
        kind = PACKED[tensor.type]
        values, scale = kind.decode(rows)
        if not bool(torch.isfinite(scale).all()):
            raise FormatError(f"{tensor.name} in {tensor.file} has a scale that is not finite")
        return _qtensor(values, scale, kind)

    def float_tensor(self, name: str) -> Tensor:
        """The tensor ``name``, decoded where it is packed: float32, float16 or bfloat16."""
        return self._in_model(name, _decoded(self._tensors[name]))

    def _in_model(self, name: str, stored: Tensor) -> Tensor:
        """The tensor ``name`` of the model, of the numbers that are stored in llama.cpp's order."""
        order = row_order(self._tensors[name].name, len(stored), self._config)
        found = stored if order is None else stored[inverse(order)]
        if self._config.model_type in {"gemma2", "gemma3_text"} and name.endswith("norm.weight"):
            found = found - 1
        return (found.T if self._is_turned(name) else found).contiguous()

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self._tensors[name].shape
        return shape[::-1] if self._is_turned(name) else shape

    def _is_turned(self, name: str) -> bool:
        """Whether the tensor ``name`` is a matrix that the model stores as ``[in, out]``."""
        owner = self.model.get_submodule(name.rpartition(".")[0])
        return type(owner).__name__ == "Conv1D" and len(self._tensors[name].shape) == 2


def _own_type(tensor: GGUFTensor) -> GridType | None:
    """The type whose blocks a matrix stays; ``None`` if it is not a grid, or becomes other codes.

    Codes of a symmetric type have a fixed zero point: where scales are negative, values would
    change their sign, and the lowest has no opposite.
    """
    kind = PACKED.get(tensor.type)
    if kind is None or kind.high != 127:
        return OWN.get(tensor.type)
    signed = GRID_TYPES[kind.name]
    blocks = _data(tensor).reshape(-1, signed.nbytes)
    negative = blocks[as_halves(blocks[:, :2]) < 0]
    return signed if bool((signed.unpack(negative).codes == 0).any()) else None


def _qtensor(values: Tensor, scale: Tensor, kind: BlockType) -> QTensor:
    """Blocks as codes: where a scale is negative, it and the values change their sign."""
    bits = BITS[kind.name]
    negative = scale < 0
    blocks = values.unflatten(1, (-1, kind.weights))
    zero = torch.full_like(scale, -kind.low, dtype=torch.int16)
    if kind.high != 127:  # symmetric: the zero point stays, see `_own_type`
        zero = torch.where(negative, kind.high, zero)
    codes = torch.where(negative.unsqueeze(2), -blocks, blocks) + zero.unsqueeze(2)
    # A scale of 0 means zeros; quantine's are positive, with codes at the zero point.
    empty = scale == 0
    codes = torch.where(empty.unsqueeze(2), zero.unsqueeze(2), codes)
    positive = torch.where(empty, torch.ones_like(scale), scale.abs())
    stored = None if kind.high == 127 else zero.to(torch.uint8)
    return QTensor(codes.flatten(1).to(torch.uint8), Grid(positive, stored, bits, kind.weights))


def _data(tensor: GGUFTensor) -> Tensor:
    return torch.frombuffer(bytearray(tensor.read()), dtype=torch.uint8)


def _float32(tensor: GGUFTensor) -> Tensor:
    """A tensor in float32, of which a few rows are decoded at a time."""
    found = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
    rows = found.view(-1, tensor.shape[-1])
    step = max(1, AT_ONCE // tensor.shape[-1])
    nbytes = tensor.nbytes // len(rows)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        within = replace(
            tensor,
            shape=tuple(part.shape),
            offset=tensor.offset + start * nbytes,
            nbytes=len(part) * nbytes,
        )
        part.copy_(_decoded(within))
    return found


def _decoded(tensor: GGUFTensor) -> Tensor:
    """A tensor in floats, whatever its type."""
    data = _data(tensor)
    if tensor.type in FLOATS:
        return data.view(FLOATS[tensor.type]).reshape(tensor.shape).clone()
    rows = data.reshape(math.prod(tensor.shape[:-1]), -1)
    if tensor.type in PACKED:
        kind = PACKED[tensor.type]
        values, scale = kind.decode(rows)
        blocks: Tensor = values.unflatten(1, (-1, kind.weights)).float()
        decoded = blocks * scale.float().unsqueeze(2)
        return decoded.reshape(tensor.shape)
    from gguf import GGMLQuantizationType, dequantize

    found = dequantize(rows.numpy(), GGMLQuantizationType(tensor.type))
    return torch.from_numpy(found).reshape(tensor.shape)
