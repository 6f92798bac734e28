"""Reading GPTQ checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from quantine.core.spec import QuantSpec
from quantine.formats.foreign.gptq.layout import NAMES, unpack_matrix
from quantine.formats.foreign.gptq.settings import read_settings
from quantine.formats.foreign.opened import DirectoryLayout, Spec, Unpack
from quantine.formats.foreign.plain import Plain


def _spec(said: Mapping[str, Any]) -> Spec:
    return read_settings(said).spec


def _unpack(said: Mapping[str, Any]) -> Unpack:
    settings = read_settings(said)

    def read(
        name: str, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, int]
    ) -> Plain:
        size = spec.group_length(shape[1])
        return unpack_matrix(
            name, tensors, spec.bits, settings.version, shape, size, settings.ordered
        )

    return read


LAYOUT: Final = DirectoryLayout(NAMES, _spec, _unpack)
"""How the matrices of a GPTQ checkpoint are stored."""
