"""Packed experts of one block, of which the chosen ones are multiplied together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from quantine.core.ambient import without_autocast
from quantine.core.overrides import is_overridden
from quantine.families.expert_layout import DOWN
from quantine.families.experts import Experts, rows_of
from quantine.kernels import backend
from quantine.kernels.matrix import TILED_ROWS, grouped_product
from quantine.runtime.modules import QuantLinear
from quantine.runtime.packed import takes_kernels
from quantine.runtime.recorded import is_compiled, listed, run_experts
from quantine.runtime.stacked_experts import StackedExperts, stacked_experts


class PackedExperts(Experts):
    """The experts of one block of a loaded model.

    On the CPU, the products of all chosen experts with their tokens are one call of the native
    extension, and so are those with what is activated. On a GPU the matrices of all experts lie
    together, and its programs read which are chosen, so the host waits for nothing. Each expert is
    called by itself elsewhere, and where a chosen one (on a GPU: any) has matrices that are not
    packed, round their inputs, differ in how they are multiplied or have something put onto them;
    and on a GPU where experts have more than `TILED_ROWS` rows on average. What is computed is the
    same. A compiled graph holds one operator, see `quantine.runtime.recorded`.

    Args:
        fused: as for `Experts`.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__(fused)
        self._number = listed(self)
        self._stacked: StackedExperts | None = None

    def mixed(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """See `quantine.families.experts.Experts.mixed`."""
        if is_compiled(x):
            result: Tensor = run_experts(x, index, weights, self._number)
            return result
        tokens, chosen = index.shape
        stacked = self._stacked_for(x, index.numel())
        if stacked is None:
            return super().mixed(x, index, weights)
        numbers = index.flatten()
        if len(numbers) <= len(self):  # hardly two of one expert
            found = self._run_stacked(stacked, x.repeat_interleave(chosen, 0), numbers, False)
        else:
            order = numbers.argsort(stable=True)
            rows, mine = x.index_select(0, order // chosen), numbers.index_select(0, order)
            sorted_outputs = self._run_stacked(stacked, rows, mine, True)
            found = torch.empty_like(sorted_outputs).index_copy_(0, order, sorted_outputs)
        outputs = (found * weights.flatten()[:, None]).to(found.dtype)
        return outputs.view(tokens, chosen, -1).sum(1)

    def run(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """See `quantine.families.experts.Experts.run`."""
        chosen: list[Any] = [expert for expert, count in zip(self, counts, strict=True) if count]
        counted = [count for count in counts if count]
        if not (chosen and _computes(x, "native") and _are_alike(chosen, x.dtype)):
            return super().run(x, counts)
        found = _products(chosen, chosen[0].inputs, x, counted)
        inner = None if found is None else chosen[0].activated(*found)
        outputs = None if inner is None else _products(chosen, (DOWN,), inner, counted)
        return super().run(x, counts) if outputs is None else outputs[0]

    def _stacked_for(self, x: Tensor, rows: int) -> StackedExperts | None:
        """What a GPU's programs multiply so many rows like ``x`` with; ``None`` where they do not.

        It is made at first use, and again when a tensor of an expert is replaced or written to.
        """
        if not 0 < rows <= TILED_ROWS * len(self) or not _computes(x, "triton"):
            return None
        experts: list[Any] = list(self)
        if not _are_alike(experts, x.dtype):
            self._stacked = None
        elif self._stacked is None or not self._stacked.is_of(experts, x.device):
            self._stacked = None  # frees its memory
            self._stacked = stacked_experts(experts, x.device)
        return self._stacked

    def _run_stacked(
        self, stacked: StackedExperts, x: Tensor, numbers: Tensor, ordered: bool
    ) -> Tensor:
        """Outputs ``[rows, width]`` of the expert of each row of ``x``.

        A row with a number behind all experts is its own output: it runs through one of them, too,
        so that the host need not wait for how many there are.
        """
        first: Any = self[0]
        back = self._layout.hands_back
        own = numbers.clamp(max=len(self) - 1) if back else numbers
        found = [stacked.product(name, x, own, ordered) for name in first.inputs]
        outputs = stacked.product(DOWN, first.activated(*found), own, ordered)
        return outputs.where((numbers < len(self))[:, None], x) if back else outputs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._stacked = None  # each expert may go elsewhere
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """The state without the matrices of programs: copies make some of their own."""
        return {**self.__dict__, "_stacked": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has a number of its own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = listed(self)


def _computes(x: Tensor, kernels: backend.Backend) -> bool:
    """Whether it is these ``kernels`` that multiply ``x``."""
    return takes_kernels(x) and backend.of(x) == kernels


def _are_alike(experts: Sequence[Any], dtype: torch.dtype) -> bool:
    """Whether all matrices of ``experts`` are packed, and multiplied in one and the same way."""
    matrices = [one.get_submodule(name) for one in experts for name in (*one.inputs, DOWN)]
    return (
        all(map(_is_plain, matrices))
        and not any(map(is_overridden, (*experts, *matrices)))
        and len({matrix.arithmetic for matrix in matrices}) == 1
        and (dtype != torch.float16 or all("exponent" not in m.tensor_names for m in matrices))
    )


def _is_plain(module: nn.Module) -> bool:
    return type(module) is QuantLinear and module.inputs is None


def _products(
    experts: Sequence[Any], names: Sequence[str], x: Tensor, counts: Sequence[int]
) -> list[Tensor] | None:
    """Outputs ``[rows, out]`` of the matrices ``names`` of experts, each for rows of its own.

    Returns:
        One for each name; ``None`` where the extension cannot read a matrix.
    """
    modules: Any = [[one.get_submodule(name) for name in names] for one in experts]
    matrices = [[module.matrix(x.device) for module in some] for some in modules]
    if any(matrix is None for some in matrices for matrix in some):
        return None
    with without_autocast(x.device):
        found = grouped_product(matrices, x, counts, modules[0][0].arithmetic)
    for some, rows in zip(modules, rows_of(counts), strict=True):
        for module, result in zip(some, found, strict=True):
            if module.bias is not None:
                result[rows] += module.bias.to(x.dtype)
    return found
