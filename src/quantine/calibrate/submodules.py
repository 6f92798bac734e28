"""What submodules of a block put out, again and again on the same inputs as weights change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from quantine.calibrate.sequential import Sequential

OUTPUT_TOKENS: Final = 4096
"""Calibration tokens that are enough to rank changes of an output."""


def judged_module(groups: Sequence[Sequence[str]], path: str) -> str:
    """The module in a block whose output tells what a change of the matrix at ``path`` costs.

    That is what holds the matrix and others that run after it: attention for queries, keys and
    values, the MLP for gate and up. For the last matrix of such a part it is the matrix itself.

    Args:
        groups: of the block, see `quantine.families.family.Family.groups_in`.
        path: of a matrix in one of them.

    Returns:
        A path inside the block; empty for the whole block.
    """
    parent = path.rpartition(".")[0]
    number = next(number for number, group in enumerate(groups) if path in group)
    later = (other for group in groups[number + 1 :] for other in group)
    return parent if any(other.rpartition(".")[0] == parent for other in later) else path


class SubmoduleOutputs:
    """Submodules of block ``index``, with what enters them while the block is as it is now.

    Args:
        paths: of modules in ``block``, see `judged_module`.
    """

    def __init__(
        self, sequential: Sequential, index: int, block: nn.Module, paths: Sequence[str]
    ) -> None:
        self._setup = sequential.setup
        self._modules = {path: block.get_submodule(path) for path in paths}
        self._calls: dict[str, list[tuple[Any, Any]]] = {path: [] for path in paths}
        handles = [
            module.register_forward_pre_hook(self._recorder(path), with_kwargs=True)
            for path, module in self._modules.items()
        ]
        hidden, tokens = sequential.hidden, 0
        try:
            with torch.no_grad():
                for batch in range(len(hidden)):
                    if tokens < OUTPUT_TOKENS:
                        sequential.run(index, hidden[batch])
                        tokens += hidden[batch].shape[0] * hidden[batch].shape[1]
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def outputs(self, path: str) -> list[Tensor]:
        """What the module at ``path`` puts out with its weights of now, a tensor for each batch."""
        results = []
        with self._setup.autocast():
            for args, kwargs in self._calls[path]:
                output = self._modules[path](*args, **kwargs)
                results.append(output[0] if isinstance(output, tuple) else output)
        return results

    def _recorder(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._calls[path].append((args, kwargs))

        return record
