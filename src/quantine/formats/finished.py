"""A finished directory: what it says of itself, its matrices, and packing them once more.

Nothing else is needed for that: no run, no calibration, and transformers only where nobody has
described the architecture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from quantine.core.arithmetic import UNSTATED
from quantine.core.qtensor import QTensor
from quantine.errors import FormatError
from quantine.families import described_family, family_of, is_described
from quantine.families.family import Family
from quantine.formats import format_named
from quantine.formats.described import described, kept_linears, packed_entries, read_config
from quantine.formats.description import Description
from quantine.formats.floats import as_stored
from quantine.formats.headers import entries_of
from quantine.formats.repack import check_repackable, repack
from quantine.formats.stored_config import check_description, spec_of
from quantine.source.checkpoint import Checkpoint
from quantine.source.model_source import ModelSource
from quantine.source.tensor_files import SafetensorsFiles
from quantine.source.weight_files import weight_files


def _family(path: Path, config: Mapping[str, Any]) -> Family:
    """The architecture of the model in ``path``, whose ``config.json`` holds ``config``."""
    kind = config.get("model_type", "")
    if is_described(kind):
        return described_family(kind)
    return family_of(ModelSource(str(path), path).config())


class FinishedDirectory:
    """A directory that a run of quantine finished, in any of its layouts.

    Opening reads JSON and the headers of weight files. Tensors are read when they are asked for,
    and none is kept, so whoever goes from layer to layer has one in memory.

    Attributes:
        path: the directory.
        files: its weight files.
        kept: where the tensors that are not packed lie, by name, in the order of the files.
        description: its packed layers, with shapes as the headers give them, and schemes as the
            run used them.

    Args:
        path: the directory, which may be a copy without its report where its layouts are
            quantine's own.

    Raises:
        FormatError: it is unfinished, or not quantine's; or it is damaged, and the message names
            the field, file, layer or tensor.
        CheckpointError: a weight file is missing.
        FamilyError: the architecture is not covered.
        OutputError: a JSON file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config = read_config(path)
        found = described(path, config)
        check_description(found)
        self.files = weight_files(path)
        entries = entries_of(self.files)
        self._checkpoint = Checkpoint(SafetensorsFiles(path))
        self._family = _family(path, config)
        self._packed = {
            name: packed_entries(name, found["schemes"][layer["scheme"]], layer["shape"], entries)
            for name, layer in found["layers"].items()
        }
        packed = {entry.name for layer in self._packed.values() for entry in layer.values()}
        self.kept = {name: entry for name, entry in entries.items() if name not in packed}
        self.description = Description(
            found["schemes"],
            found["layers"],
            found.get("arithmetic", UNSTATED),
            found.get("activations"),
            {
                name: {key: entry.shape for key, entry in layer.items()}
                for name, layer in self._packed.items()
            },
            kept_linears(self._family, self.kept, self._packed),
        )

    def scheme(self, name: str) -> dict[str, Any]:
        """The scheme of layer ``name``, as plain values.

        Raises:
            FormatError: there is no such layer.
        """
        if name not in self.description.layers:
            raise FormatError(f"{self.path} has no quantized layer {name!r}: see quantine inspect")
        number: int = self.description.layers[name]["scheme"]
        return self.description.schemes[number]

    def nbytes(self, name: str) -> int:
        """Bytes of the packed tensors of layer ``name``, from the headers."""
        return sum(entry.nbytes for entry in self._packed[name].values())

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The packed tensors of layer ``name`` as they are stored, by their names in its layout.

        Raises:
            FormatError: there is no such layer.
            CheckpointError: the file cannot be read any more.
        """
        self.scheme(name)
        names = {key: entry.name for key, entry in self._packed[name].items()}
        read = self._checkpoint.read(names.values())
        return {key: read[full] for key, full in names.items()}

    def qtensor(self, name: str) -> QTensor:
        """The matrix that layer ``name`` holds.

        Raises:
            FormatError: names the layer; there is none, or its tensors are damaged.
            CheckpointError: the file cannot be read any more.
        """
        return self._unpacked(name, self.tensors(name))

    def repacked(
        self, name: str, layout_name: str, *, round_outliers: bool = False
    ) -> dict[str, Tensor]:
        """The tensors of layer ``name`` in another layout, by their names in it.

        They are those that a run would have written for the same matrix: codes, grids and the order
        of columns stay as they are, and outliers but for what `Format.pack` says of the layout.

        Args:
            layout_name: a row of `quantine.formats.FORMATS`.
            round_outliers: round outliers to float16 before. Those of ``spqr`` are float32 sums of
                what a code stands for and a float16 difference, for which ``sparse`` has no room.

        Raises:
            FormatError: names the layer, what the layout cannot hold of it, and the remedy.
            CheckpointError: the file cannot be read any more.
        """
        scheme = self.scheme(name)
        rounded = self.description.activations is not None
        check_repackable(name, layout_name, f"{name}.bias" in self.kept, rounded, self._family)
        tensors = self.tensors(name)
        qtensor = self._unpacked(name, tensors)
        if scheme["format"] == layout_name:
            return tensors
        return repack(name, qtensor, spec_of(scheme), layout_name, round_outliers)

    def described_as(
        self, layout_name: str, packed: Mapping[str, Mapping[str, tuple[int, ...]]]
    ) -> Description:
        """The description of a directory that has all layers of this one in another layout.

        Args:
            layout_name: a row of `quantine.formats.FORMATS`.
            packed: shape of every tensor that `repacked` gave, by layer and by name in the layout.

        Raises:
            FormatError: ``packed`` lacks a layer.
        """
        missing = [name for name in self.description.layers if name not in packed]
        if missing:
            raise FormatError(f"{missing[0]} has no tensors in format {layout_name}: pack it first")
        changed = [{**scheme, "format": layout_name} for scheme in self.description.schemes]
        schemes = [one for place, one in enumerate(changed) if one not in changed[:place]]
        layers = {
            name: {**layer, "scheme": schemes.index(changed[layer["scheme"]])}
            for name, layer in self.description.layers.items()
        }
        return dataclasses.replace(self.description, schemes=schemes, layers=layers, packed=packed)

    def kept_tensor(self, name: str, layout_name: str | None = None) -> Tensor:
        """The tensor ``name``, which is not packed.

        Args:
            layout_name: the layout beside which it is to be stored, whose readers may need floats
                in another dtype; ``None`` gives it as it is stored here.

        Raises:
            FormatError: there is no such tensor, or it overflows in the dtype that it needs.
            CheckpointError: the file cannot be read any more.
        """
        if name not in self.kept:
            raise FormatError(f"no file of {self.path} holds {name} as a tensor that is not packed")
        tensor = self._checkpoint.read([name])[name]
        dtype = None if layout_name is None else format_named(layout_name).float_dtype
        return tensor if dtype is None else as_stored(name, tensor, dtype)

    def _unpacked(self, name: str, tensors: dict[str, Tensor]) -> QTensor:
        """What ``tensors`` of layer ``name`` stand for."""
        scheme = self.scheme(name)
        shape, spec = self.description.layers[name]["shape"], spec_of(scheme)
        layout = format_named(scheme["format"])
        try:
            layout.check(tensors, spec, *shape)
            return layout.unpack(tensors, spec, shape[1])
        except FormatError as error:
            raise FormatError(f"{name} in {self.path} is damaged: {error}") from error
