"""Tensors of a layer as they are read from files: gathered until all are there.

vLLM gives every tensor to the parameter of its name, for a fused layer several with the same name.
How long the lists of outliers are is known only then, so nothing is copied into place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from quantine.engines.vllm.stored import StoredMatrix
from quantine.errors import FormatError
from quantine.runtime.placeholder import DTYPES
from quantine.source.names import listed

SHARDS: Final = {None: 0, "q": 0, "k": 1, "v": 2}
"""Number of a matrix in a layer by vLLM's name for it, where that is no number."""


class Arrivals:
    """Gathers the tensors of the matrices of one layer.

    Args:
        layer: vLLM's layer, which gets a parameter for each name that a tensor of it may have.
        matrices: the matrices in it.
    """

    def __init__(self, layer: nn.Module, matrices: Sequence[StoredMatrix]) -> None:
        self._matrices = matrices
        self._tensors: list[dict[str, Tensor]] = [{} for _ in matrices]
        self._names: set[str] = set()
        for matrix in matrices:
            for key, dtype in matrix.dtypes.items():
                if key not in self._names:
                    self._names.add(key)
                    _register(layer, key, DTYPES.get(dtype, torch.float32), self._loader(key))

    def take(self, layer: nn.Module) -> list[dict[str, Tensor]]:
        """The tensors of each matrix, by name; the parameters are removed from ``layer``.

        Raises:
            FormatError: one that the files hold has not arrived.
        """
        for matrix, found in zip(self._matrices, self._tensors, strict=True):
            missing = sorted(f"{matrix.name}.{key}" for key in matrix.dtypes.keys() - found.keys())
            if missing:
                raise FormatError(f"vLLM has read the files, but dropped {listed(missing)}")
        for name in {key.partition(".")[0] for key in self._names}:
            delattr(layer, name)
        taken, self._tensors = self._tensors, []
        return taken

    def _loader(self, key: str) -> Callable[..., None]:
        def load(_: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
            index = shard if isinstance(shard, int) else SHARDS.get(shard)
            if index is None or index >= len(self._matrices):
                raise FormatError(f"vLLM reads {key} into part {shard!r} of a layer without it")
            name, found = f"{self._matrices[index].name}.{key}", self._tensors[index]
            if key not in self._matrices[index].dtypes:
                raise FormatError(f"vLLM reads {name}, but its file has no such tensor")
            if key in found:
                raise FormatError(f"vLLM reads {name} twice")
            found[key] = loaded

        return load


def _register(layer: nn.Module, key: str, dtype: torch.dtype, loader: Callable[..., None]) -> None:
    """Give ``layer`` an empty parameter ``key``, which may be one of a child, and its loader."""
    parameter: Any = nn.Parameter(
        torch.empty(0, dtype=dtype, device=torch.get_default_device()), requires_grad=False
    )
    parameter.weight_loader = loader  # which vLLM calls
    child, _, leaf = key.rpartition(".")
    if child and not hasattr(layer, child):
        layer.add_module(child, nn.Module())
    owner = layer.get_submodule(child) if child else layer
    owner.register_parameter(leaf, parameter)
