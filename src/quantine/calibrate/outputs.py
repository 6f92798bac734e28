"""What parts of a block put out, again and again on the same inputs while their weights change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from quantine.calibrate.sequential import Sequential
from quantine.families.base import Family

OUTPUT_TOKENS: Final = 4096
"""Calibration tokens that are enough to rank changes of an output."""


def part_of(family: Family, path: str) -> str:
    """The module in a block whose output tells what a change of the matrix at ``path`` costs.

    That is what holds the matrix and others that run after it: attention for queries, keys and
    values, the MLP for gate and up. For the last matrix of such a part it is the matrix itself.

    Returns:
        A path inside the block; empty for the whole block.
    """
    parent = path.rpartition(".")[0]
    number = next(number for number, group in enumerate(family.groups) if path in group)
    later = (other for group in family.groups[number + 1 :] for other in group)
    return parent if any(other.rpartition(".")[0] == parent for other in later) else path


class Parts:
    """Parts of block ``index``, with what enters them while the block is as it is now.

    Args:
        paths: of modules in ``block``, see `part_of`.
        bfloat16: as of `Sequential`.
    """

    def __init__(
        self,
        sequential: Sequential,
        index: int,
        block: nn.Module,
        paths: Sequence[str],
        bfloat16: bool,
    ) -> None:
        self._bfloat16 = bfloat16
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
        """What the part at ``path`` puts out with its present weights, a tensor for each batch."""
        results = []
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            for args, kwargs in self._calls[path]:
                output = self._modules[path](*args, **kwargs)
                results.append(output[0] if isinstance(output, tuple) else output)
        return results

    def _recorder(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._calls[path].append((args, kwargs))

        return record


def relative_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Squared difference of outputs relative to their square before."""
    pairs = zip(before, after, strict=True)
    change = sum(float((a.float() - b.float()).square().sum(dtype=torch.float64)) for b, a in pairs)
    total = sum(float(b.float().square().sum(dtype=torch.float64)) for b in before)
    return change / max(total, 1e-30)


def token_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Mean over tokens of the squared difference of outputs relative to a token's square before.

    Unlike `relative_change` it is not about the one token that is a thousand times louder than
    the others, as the first one is in many models: the norm that comes next makes all alike.
    """
    changes = [
        (a.float() - b.float()).square().sum(-1) / b.float().square().sum(-1).clamp(min=1e-30)
        for b, a in zip(before, after, strict=True)
    ]
    return float(torch.cat([change.flatten() for change in changes]).mean(dtype=torch.float64))
