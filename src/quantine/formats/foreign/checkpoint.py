"""Writing a Hugging Face directory whose matrices are in the layout of another engine."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.formats.foreign.target import Exportable
from quantine.formats.shards import merge_parts, write_atomically, write_tensors
from quantine.formats.tokenizer_files import copy_small_files

SHARD_BYTES: Final = 4_000_000_000
"""Largest size of one weight file, in bytes."""

Pack = Callable[[str, QTensor], Mapping[str, Tensor]]
"""Gives the tensors of a layer by their names in a layout."""


def write_weights(source: Exportable, out: Path, pack: Pack) -> None:
    """Write the weight files of ``source`` into ``out``; one tensor is in memory at a time.

    Args:
        pack: called for each matrix that is quantized; others are stored in floats.

    Raises:
        FormatError: a matrix does not fit.
    """
    with tempfile.TemporaryDirectory(dir=out, prefix=".parts-") as name:
        parts = []
        for number, key in enumerate([*source.floats, *source.matrices]):
            parts.append(Path(name) / f"{number:06}.safetensors")
            write_tensors(parts[-1], _tensors(source, key, pack))
        merge_parts(parts, out, SHARD_BYTES)


def _tensors(source: Exportable, name: str, pack: Pack) -> dict[str, Tensor]:
    if name not in source.matrices:
        return {name: source.read_float(name)}
    found = source.read(name)
    if isinstance(found, Tensor):
        weight = found.T if source.matrices[name].transposed else found
        return {f"{name}.weight": weight.contiguous()}
    return {f"{name}.{key}": tensor for key, tensor in pack(name, found).items()}


def write_files(source: Exportable, out: Path, changes: Mapping[str, Any]) -> None:
    """Write ``config.json`` with ``changes``, and copy the tokenizer's files.

    Args:
        changes: fields of ``config.json`` beside those of the float model.
    """
    copy_small_files(source.directory, out)
    settings = {**source.settings, **changes}
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    write_atomically(out / "config.json", text.encode())


class ScaleDtype:
    """The dtype in which an engine must compute so that it takes scales as they are stored.

    Engines convert scales to the model's dtype when they load them.

    Args:
        wanted: the dtype of the model, or the one that was asked for.
    """

    def __init__(self, wanted: torch.dtype) -> None:
        self._wanted = wanted
        self._exact = True

    @classmethod
    def of(cls, source: Exportable) -> ScaleDtype:
        """That of ``source``: float16 for float32, in which no kernel for such layouts computes."""
        own: torch.dtype = source.config.dtype or torch.float32
        return cls(source.dtype or (torch.float16 if own == torch.float32 else own))

    def see(self, scale: Tensor) -> None:
        """Take note of the ``scale`` of one matrix, float16."""
        self._exact &= torch.equal(scale.to(self._wanted).float(), scale.float())

    @property
    def name(self) -> str:
        """The wanted dtype if that holds every scale, else float16, for ``config.json``."""
        return _spelled(self._wanted if self._exact else torch.float16)

    def notes(self, exact: str) -> list[str]:
        """What users have to know if it is not the wanted one.

        Args:
            exact: the dtypes that hold every scale, of those in which engines take the layout.
        """
        if self._exact:
            return []
        return [
            f"config.json says float16, not {_spelled(self._wanted)}, which would round the "
            f"scales: serve it in {exact}"
        ]


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
