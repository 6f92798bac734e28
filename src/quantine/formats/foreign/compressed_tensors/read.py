"""Reading checkpoints of compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from quantine.formats.foreign.compressed_tensors.layout import NAMES, unpack_matrix
from quantine.formats.foreign.compressed_tensors.settings import read_settings
from quantine.formats.foreign.opened import DirectoryLayout, Spec, Unpack


def _spec(said: Mapping[str, Any]) -> Spec:
    return read_settings(said).spec


def _unpack(_: Mapping[str, Any]) -> Unpack:
    return unpack_matrix


LAYOUT: Final = DirectoryLayout(NAMES, _spec, _unpack)
"""How the matrices of a checkpoint of compressed-tensors are stored."""
