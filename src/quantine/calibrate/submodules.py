"""Outputs of submodules of a block, on inputs recorded once, while their weights change.

They tell what a change of one matrix costs, as AdaDim's choice between group axes needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from quantine.calibrate.sequential import Sequential

OUTPUT_TOKENS: Final = 4096
"""Number of calibration tokens whose inputs are recorded, enough to rank changes of an output. They
are of the first shard of the text, which may have fewer."""


def judged_module(groups: Sequence[Sequence[str]], path: str) -> str:
    """The module in a block whose output tells what a change of the matrix at ``path`` costs.

    That is the module around the matrix, if another matrix in it runs later: attention for queries,
    keys and values, the MLP for gate and up. Else it is the matrix itself.

    Args:
        groups: the block's groups of matrices, see `quantine.families.family.Family.groups_in`.
        path: path inside the block of a matrix in one of the groups.

    Returns:
        Path of the module inside the block; empty for the whole block.
    """
    parent = path.rpartition(".")[0]
    number = next(number for number, group in enumerate(groups) if path in group)
    later = (other for group in groups[number + 1 :] for other in group)
    return parent if any(other.rpartition(".")[0] == parent for other in later) else path


class SubmoduleOutputs:
    """Submodules of a block, with their inputs recorded when this is made, on the first rank.

    Args:
        sequential: runs the block on the calibration text.
        index: number of the block.
        block: the block, whose weights are loaded.
        paths: paths of modules inside the block, see `judged_module`.
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
                for batch in range(sequential.judged):
                    if tokens < OUTPUT_TOKENS:
                        sequential.run(index, hidden[batch])
                        tokens += hidden[batch].shape[0] * hidden[batch].shape[1]
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def outputs(self, path: str) -> list[Tensor]:
        """The outputs of the module at ``path`` with its present weights, on the recorded inputs.

        Returns:
            One tensor ``[batch, tokens, channels]`` for each recorded batch.
        """
        results = []
        with self._setup.autocast():
            for args, kwargs in self._calls[path]:
                output = self._modules[path](*args, **kwargs)
                results.append(output[0] if isinstance(output, tuple | list) else output)
        return results

    def _recorder(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._calls[path].append((args, kwargs))

        return record
