"""Directories of other engines, opened to be read matrix by matrix."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.errors import FormatError, cut
from quantine.families import family_of
from quantine.families.layers import Layer, find_layers
from quantine.formats.foreign.plain import Plain, qtensor_of
from quantine.formats.headers import FLOATS, Entry, entries_of
from quantine.source.model_source import ModelSource
from quantine.source.names import listed, match_names
from quantine.source.pieces import in_another_layout
from quantine.source.tensor_files import Header, Part, SafetensorsFiles
from quantine.source.weight_files import float_files

Spec = Callable[[str], QuantSpec | None]
"""The grid of a layer by name, ``None`` if it is said to be float."""
Unpack = Callable[[str, Mapping[str, Tensor], QuantSpec, tuple[int, int]], Plain]
"""Reads a matrix: name of the layer, its tensors by their names in it, grid, ``(out, in)``."""


@dataclass(frozen=True)
class DirectoryLayout:
    """How the matrices of a directory are stored.

    Attributes:
        names: of every tensor that a matrix may have beside its bias.
        read_settings: gives the grids from the fields of ``quantization_config``.
        unpack: reads a matrix.
    """

    names: Sequence[str]
    read_settings: Callable[[Mapping[str, Any]], Spec]
    unpack: Callable[[Mapping[str, Any]], Unpack]


class ForeignDirectory:
    """A directory of another engine, see `quantine.formats.foreign.target.Readable`.

    Opening reads JSON, the headers of weight files, and biases that the model has not.

    Args:
        path: the directory.
        layout: of its matrices.

    Attributes:
        settings: ``config.json`` of the float model, as plain values.
        specs: the grid of each quantized matrix.
        shapes: ``(out, in)`` of each.
        floats: names of the other tensors.
        decoded: empty, as all packed matrices are on grids of quantine's.
        model: of its configuration, without weights.
        directory: the directory.
        headers: of all tensors in floats, see `read`.

    Raises:
        FormatError: it is damaged, or says what is not understood.
        CheckpointError: a file is missing or damaged.
        FamilyError: the architecture is not covered.
    """

    def __init__(self, path: Path, layout: DirectoryLayout) -> None:
        source = ModelSource(str(path), path)
        config = source.config()
        said = config.__dict__.pop("quantization_config")
        self.model: Any = source.bare_model(config)
        self.settings: Mapping[str, Any] = {
            **json.loads(config.to_json_string(use_diff=True)),
            "architectures": [type(self.model).__name__],
        }
        self._layers = {layer.name: layer for layer in find_layers(self.model, family_of(config))}
        self.directory, self._files = path, SafetensorsFiles(path)
        self._unpack = layout.unpack(said)
        entries = entries_of(float_files(path))
        self._packed = _packed(entries, layout.names)
        self.specs = _specs(self._packed, self._layers, layout.read_settings(said))
        self.shapes = {
            name: (self._layers[name].out_features, self._layers[name].in_features)
            for name in self.specs
        }
        self.decoded: Sequence[str] = ()
        taken = {entry.name for part in self._packed.values() for entry in part.values()}
        others = [name for name in entries if name not in taken]
        names = match_names(self.model, others)
        for part, *_ in names.joined.values():
            raise in_another_layout(part)
        self._stored = names.stored
        tied = self.model.all_tied_weights_keys
        self.floats = [
            name
            for name, stored in self._stored.items()
            if not (name in tied and self._stored.get(tied[name]) == stored)
        ]
        _check_complete(self.model, self._stored, self.specs, entries)
        self._check_no_more({*names.unused, *self._beside_packed()})
        self.headers = {name: self._files.headers[self._stored[name]] for name in self.floats}
        for name, shape in self.shapes.items():
            file = next(iter(self._packed[name].values())).file
            stored = shape[::-1] if self.is_transposed(name) else shape
            self.headers[f"{name}.weight"] = Header(stored, "F32", file)

    def _beside_packed(self) -> set[str]:
        """Names of float weights in the files whose layers are packed."""
        weights = {f"{name}.weight" for name in self.specs}
        used = {stored for name, stored in self._stored.items() if name not in weights}
        return {self._stored[name] for name in weights & self._stored.keys()} - used

    def _check_no_more(self, unused: Collection[str]) -> None:
        """Refuse tensors that no one would read.

        Biases of zeros that the model has not are let be: older programs add them to every layer.

        Raises:
            FormatError: names them.
        """
        surplus = sorted(set(unused) - self._zero_biases(unused))
        if surplus:
            raise FormatError(
                f"files hold {listed(surplus)} for which neither the model nor the layout has a "
                "place: the checkpoint is damaged, of another version, or rounds more than weights "
                "(a cache, say); remove them from the files to go on without"
            )

    def _zero_biases(self, unused: Collection[str]) -> set[str]:
        """Those of the stored tensors ``unused`` that are biases of packed layers, all zeros."""
        biases = [
            name
            for name in unused
            if name.endswith(".bias") and name.removesuffix(".bias") in self.specs
        ]
        read = self._files.read([(name, None) for name in biases])
        return {name for name, bias in zip(biases, read, strict=True) if not bias.any()}

    def read(self, wanted: Sequence[tuple[str, Part]]) -> list[Tensor]:
        """Any tensors as floats: quantized matrices decoded, the others as they are stored.

        Raises:
            FormatError: a matrix is damaged, see `qtensor`.
            CheckpointError: a file is unreadable.
        """
        found = []
        for name, part in wanted:
            whole = self.float_tensor(name) if name in self._stored else self._decoded(name)
            found.append(whole if part is None else whole[part])
        return found

    def _decoded(self, name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        weight = self._matrix(layer).decoded()
        return (weight.T if self.is_transposed(layer) else weight).contiguous()

    def is_transposed(self, name: str) -> bool:
        """Whether the model stores the weight of layer ``name`` as ``[in, out]``."""
        return self._layers[name].transposed

    def qtensor(self, name: str) -> QTensor:
        """The matrix of layer ``name``.

        Raises:
            FormatError: it is damaged, its zero points are not those of its settings, or
                float16 does not hold its scales.
        """
        return qtensor_of(name, self._matrix(name), self.specs[name].sym)

    def _matrix(self, name: str) -> Plain:
        """The matrix of layer ``name``, see `qtensor`, with scales as they are stored."""
        spec = self.specs[name]
        names = {key: entry.name for key, entry in self._packed[name].items()}
        read = self._files.read([(stored, None) for stored in names.values()])
        tensors = dict(zip(names, read, strict=True))
        matrix = self._unpack(name, tensors, spec, self.shapes[name])
        if spec.sym and bool((matrix.zero != 2 ** (spec.bits - 1)).any()):
            raise FormatError(
                f"{name} has zero points, but its settings say that there are none: damaged, or "
                "of another version of the format"
            )
        return matrix

    def float_tensor(self, name: str) -> Tensor:
        """The tensor ``name``, which is not quantized."""
        return self._files.read([(self._stored[name], None)])[0]


def _packed(entries: Mapping[str, Entry], names: Sequence[str]) -> dict[str, dict[str, Entry]]:
    """Where the tensors of quantized layers lie, by layer and by their names in it."""
    found: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        owner, _, leaf = name.rpartition(".")
        if leaf in names:
            found.setdefault(owner, {})[leaf] = entry
    return found


def _specs(
    packed: Mapping[str, Any], layers: Mapping[str, Layer], spec_named: Spec
) -> dict[str, QuantSpec]:
    """The grid of every layer that has packed tensors, in running order.

    Raises:
        FormatError: the model has no such layer, its settings call it float, or groups do not
            divide its inputs.
    """
    unknown = [name for name in packed if name not in layers]
    if unknown:
        raise FormatError(
            f"files hold packed {listed(sorted(unknown))}, but the model has no such layer: they "
            "do not belong together"
        )
    specs = {}
    for name, layer in layers.items():
        if name not in packed:
            continue
        spec = spec_named(name)
        if spec is None:
            raise FormatError(f"{cut(name)} is packed, but quantization_config calls it float")
        if not spec.divides(layer.in_features):
            raise FormatError(
                f"{cut(name)}: groups of {spec.group_size} do not divide {layer.in_features} inputs"
            )
        specs[name] = spec
    if not specs:
        raise FormatError("no layer of the model has packed tensors: the weights are not there")
    return specs


def _check_complete(
    model: Any,
    stored: Mapping[str, str],
    specs: Mapping[str, QuantSpec],
    entries: Mapping[str, Entry],
) -> None:
    """Refuse files that lack a tensor, have one of another shape, or hold it in another kind.

    Raises:
        FormatError: names the tensor.
    """
    packed = {f"{name}.weight" for name in specs}
    for name, tensor in model.state_dict().items():
        if name in packed or (
            name not in stored and model.all_tied_weights_keys.get(name) in packed
        ):
            continue
        if name not in stored:
            raise FormatError(f"no file holds {cut(name)}: the download may be incomplete")
        entry = entries[stored[name]]
        if tensor.is_floating_point() and entry.dtype not in FLOATS:
            raise FormatError(f"{cut(name)} is stored as {entry.dtype}, which is no float")
        if entry.shape != tuple(tensor.shape):
            raise FormatError(
                f"{cut(name)} is {list(entry.shape)} in the files, but {list(tensor.shape)} in the "
                "model"
            )
