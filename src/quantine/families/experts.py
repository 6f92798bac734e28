"""Mixtures of experts: one module for each expert, in place of parameters that hold all of them.

Models of transformers compute with fused parameters, as ``[experts, out, in]``. Here each matrix
has a module of its own. So it is solved, packed and run like any other; its name is that which most
checkpoints store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor, nn

GATE: Final = "gate_proj"
"""Name of an expert's matrix whose outputs are activated, where there are gates."""
UP: Final = "up_proj"
"""Name of an expert's matrix whose outputs are multiplied by those of the gate, or activated."""
DOWN: Final = "down_proj"
"""Name of an expert's last matrix."""
FUSED: Final = "gate_up_proj"
"""Name of the parameter that holds gates and ups of all experts."""
SETTINGS: Final = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")
"""Attributes that transformers gives to modules of fused experts; they say how these lie."""


@dataclass(frozen=True)
class Piece:
    """Where a tensor of one expert is inside of a fused parameter.

    Attributes:
        parameter: full name of the parameter.
        expert: number of the expert.
        outputs: which outputs of the fused matrix are those of the tensor.
        transposed: whether matrices are ``[in, out]`` in the parameter.
    """

    parameter: str
    expert: int
    outputs: slice
    transposed: bool

    def of(self, fused: Tensor) -> Tensor:
        """The tensor, ``[out, in]`` or ``[out]``, as a view into ``fused`` of that expert alone."""
        matrix = fused.T if self.transposed and fused.ndim == 2 else fused
        return matrix[self.outputs]

    @property
    def is_plain(self) -> bool:
        """Whether the tensor lies there as it would lie alone: not transposed, nor with gaps."""
        return not self.transposed and self.outputs.step is None


class Expert(nn.Module):
    """One expert.

    Args:
        fused: the module of transformers, which says how outputs of gate and up become inputs of
            the last matrix.
        number: which of its experts this is; weights are views into the fused parameters.

    Attributes:
        gate_proj, up_proj, down_proj: its matrices; there is no ``gate_proj`` where experts have
            none.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, fused: Any, number: int) -> None:
        super().__init__()
        self._fused = [fused]  # in a list, so that its parameters are not this module's
        for leaf, parameter, outputs in _parts(fused):
            piece = Piece(parameter, number, outputs, fused.is_transposed)
            weight = piece.of(fused.get_parameter(parameter)[number].detach())
            rows, columns = weight.shape
            linear = nn.Linear(columns, rows, fused.has_bias, "meta", weight.dtype)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if fused.has_bias:
                bias = piece.of(fused.get_parameter(f"{parameter}_bias")[number].detach())
                linear.bias = nn.Parameter(bias, requires_grad=False)
            setattr(self, leaf, linear)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the matrices that read the tokens: the gate, where there is one, and ``UP``."""
        return (GATE, UP) if self._fused[0].has_gate else (UP,)

    def activated(self, *products: Tensor) -> Tensor:
        """What the last matrix reads, from the outputs of `inputs`; all experts do the same."""
        rule = self._fused[0]
        if not rule.has_gate:
            inner: Tensor = rule.act_fn(*products)
        elif rule.is_concatenated:
            inner = rule._apply_gate(torch.cat(products, -1))
        else:
            inner = rule._apply_gate(torch.stack(products, -1).flatten(-2))
        return inner

    def forward(self, x: Tensor) -> Tensor:
        """Map the tokens ``[tokens, width]`` that chose this expert to its outputs."""
        inner = self.activated(*(self.get_submodule(name)(x) for name in self.inputs))
        result: Tensor = self.down_proj(inner)
        return result


class Experts(nn.ModuleList):
    """The experts of one block, each a module; takes the place of a module of fused ones.

    Args:
        fused: the module of transformers, which loses its parameters.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__(Expert(fused, number) for number in range(fused.num_experts))
        self._parts = tuple(_parts(fused))
        self._has_bias, self._is_transposed = bool(fused.has_bias), bool(fused.is_transposed)
        for name in list(fused._parameters):
            del fused._parameters[name]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum of the outputs of each token's experts.

        Only experts that some token chose are run.

        Args:
            hidden_states: ``[tokens, width]``.
            top_k_index: ``[tokens, k]``, the numbers of each token's experts.
            top_k_weights: ``[tokens, k]``, the factors of their outputs.
        """
        tokens, chosen = top_k_index.shape
        numbers = top_k_index.flatten()
        order = numbers.argsort(stable=True)
        counts = numbers.bincount(minlength=len(self)).tolist()
        found = self.run(hidden_states[order // chosen], counts)
        outputs = torch.empty_like(found)
        outputs[order] = (found * top_k_weights.flatten()[order, None]).to(found.dtype)
        return outputs.view(tokens, chosen, -1).sum(1)

    def run(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Outputs ``[rows, width]`` of the experts; one without rows is not run.

        Args:
            x: ``[rows, width]``, those of the first expert, of the second, and so on.
            counts: how many rows each expert has.
        """
        outputs = torch.empty_like(x)
        for expert, rows in zip(self, rows_of(counts), strict=True):
            if rows.start < rows.stop:
                outputs[rows] = expert(x[rows])
        return outputs

    def groups(self, count: int) -> Iterator[tuple[str, ...]]:
        """Names inside of such a module of its matrices; those that read one input together.

        All that read the block's hidden states come before those that read what these put out.

        Args:
            count: number of experts; those of a small model stand for more.
        """
        inputs = tuple(leaf for leaf, _, _ in self._parts if leaf != DOWN)
        for number in range(count):
            yield tuple(f"{number}.{leaf}" for leaf in inputs)
        for number in range(count):
            yield (f"{number}.{DOWN}",)

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """Where each tensor is in the fused parameters, by names inside of this module."""
        for number in range(len(self)):
            for leaf, parameter, outputs in self._parts:
                piece = Piece(parameter, number, outputs, self._is_transposed)
                yield f"{number}.{leaf}.weight", piece
                if self._has_bias:
                    bias = Piece(f"{parameter}_bias", number, outputs, False)
                    yield f"{number}.{leaf}.bias", bias


def rows_of(counts: Sequence[int]) -> list[slice]:
    """Rows that follow each other, so many of each."""
    return [slice(end - count, end) for count, end in zip(counts, accumulate(counts), strict=True)]


def separate(model: nn.Module, kind: type[Experts] = Experts) -> None:
    """Put `Experts` in the place of every module of fused experts that is understood.

    What the model computes stays the same. Others are left as they are.

    Args:
        model: the model that is changed.
        kind: what is put there.
    """
    for name, module in fused_experts(model).items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, kind(module))


def fused_experts(model: nn.Module) -> dict[str, Any]:
    """All modules of fused experts in ``model`` that `separate` understands, by their paths."""
    return {name: module for name, module in model.named_modules() if _is_fused(module)}


def experts_in(module: nn.Module) -> Mapping[str, Experts]:
    """All `Experts` inside of ``module``, by their paths there."""
    return {path: part for path, part in module.named_modules() if isinstance(part, Experts)}


def _is_fused(module: Any) -> bool:
    """Whether ``module`` has experts as `Expert` runs them, and no tensors beside."""
    if not all(hasattr(module, name) for name in SETTINGS):
        return False
    if getattr(module, "has_post_expert_norm", False):
        return False
    names = {parameter for _, parameter, _ in _parts(module)}
    names |= {f"{name}_bias" for name in names} if module.has_bias else set()
    found = {name for name, _ in module.named_parameters()}
    return found == names and not list(module.buffers())


def _parts(fused: Any) -> Iterator[tuple[str, str, slice]]:
    """Name of each matrix of an expert, the fused parameter it is in, and which outputs it has."""
    if not fused.has_gate:
        yield UP, UP, slice(None)
    elif fused.is_concatenated:
        parameter = fused.get_parameter(FUSED)
        middle = parameter.shape[2 if fused.is_transposed else 1] // 2
        yield GATE, FUSED, slice(0, middle)
        yield UP, FUSED, slice(middle, None)
    else:
        yield GATE, FUSED, slice(0, None, 2)
        yield UP, FUSED, slice(1, None, 2)
    yield DOWN, DOWN, slice(None)
