"""Mixtures of experts: one module for each expert, in place of parameters that hold all of them.

Models of transformers compute with fused parameters, as ``[experts, out, in]``. Here each matrix
has a module of its own. So it is solved, packed and run like any other; its name is that which most
checkpoints store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from quantine.families.expert_layout import DOWN, GATE, UP, Layout, layout_of


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
        layout: how experts lie in it.
        number: which of its experts this is; weights are views into the fused parameters.

    Attributes:
        gate_proj, up_proj, down_proj: its matrices; there is no ``gate_proj`` where experts have
            none.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, fused: Any, layout: Layout, number: int) -> None:
        super().__init__()
        self._fused = [fused]  # in a list, so that its parameters are not this module's
        self._has_gate = layout.has_gate
        for leaf, parameter, outputs in layout.parts:
            piece = Piece(parameter, number, outputs, layout.is_transposed)
            weight = piece.of(fused.get_parameter(parameter)[number].detach())
            rows, columns = weight.shape
            linear = nn.Linear(columns, rows, layout.has_bias, "meta", weight.dtype)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if layout.has_bias:
                bias = piece.of(fused.get_parameter(f"{parameter}_bias")[number].detach())
                linear.bias = nn.Parameter(bias, requires_grad=False)
            setattr(self, leaf, linear)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the matrices that read the tokens: the gate, where there is one, and ``UP``."""
        return (GATE, UP) if self._has_gate else (UP,)

    def activated(self, *products: Tensor) -> Tensor:
        """What the last matrix reads, from the outputs of `inputs`; all experts do the same."""
        rule = self._fused[0]
        if not self._has_gate:
            inner: Tensor = rule.act_fn(*products)
        elif not hasattr(rule, "_apply_gate"):
            gate, up = products
            inner = rule.act_fn(gate) * up
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
        layout = layout_of(fused)
        assert layout is not None
        super().__init__(Expert(fused, layout, number) for number in range(layout.experts))
        self._layout = layout
        for name in list(fused._parameters):
            del fused._parameters[name]

    @property
    def choices(self) -> int:
        """How many numbers a token may choose among, see `Layout.choices`."""
        return self._layout.choices

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """The sum of the outputs of each token's experts.

        Only experts that some token chose are run.

        Args:
            hidden_states: ``[tokens, width]``; where experts are called in turn, ``[experts *
                tokens, width]``, see `Layout.in_turn`, and each row has one output.
            top_k_index: ``[tokens, k]``, the numbers of each token's experts; ``None`` in turn.
            top_k_weights: ``[tokens, k]``, the factors of their outputs; ``None`` in turn.
        """
        return self.mixed(hidden_states, *self.chosen(hidden_states, top_k_index, top_k_weights))

    def chosen(
        self, x: Tensor, index: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The numbers and factors that `forward` gets, or in turn those that its rows stand for."""
        if index is not None and weights is not None:
            return index, weights
        rows = torch.arange(len(x), dtype=torch.int64, device=x.device)
        numbers = (rows // max(1, len(x) // len(self))).where(x.ne(0).any(-1), len(self))
        return numbers[:, None], torch.ones_like(x[:, :1])

    def mixed(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """`forward`, where each token has numbers of experts, and factors."""
        tokens, chosen = index.shape
        numbers = index.flatten()
        order = numbers.argsort(stable=True)
        counts = numbers.bincount(minlength=len(self)).tolist()[: len(self)]
        rows, own = x[order // chosen], sum(counts)
        found = self.run(rows[:own], counts)
        if own < len(rows):
            found = torch.cat([found, rows[own:]])
        outputs = torch.empty_like(found)
        outputs[order] = (found * weights.flatten()[order, None]).to(found.dtype)
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
        inputs = tuple(leaf for leaf, _, _ in self._layout.parts if leaf != DOWN)
        for number in range(count):
            yield tuple(f"{number}.{leaf}" for leaf in inputs)
        for number in range(count):
            yield (f"{number}.{DOWN}",)

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """Where each tensor is in the fused parameters, by names inside of this module."""
        for number in range(len(self)):
            for leaf, parameter, outputs in self._layout.parts:
                yield from self._tensors(number, leaf, parameter, outputs)

    def room(self) -> Iterator[tuple[str, Piece]]:
        """What else is in the fused parameters: gates and ups with which nothing is computed."""
        for number in range(len(self), self.choices):
            for leaf, parameter, outputs in self._layout.parts:
                if leaf != DOWN:
                    yield from self._tensors(number, leaf, parameter, outputs)

    def _tensors(
        self, number: int, leaf: str, parameter: str, outputs: slice
    ) -> Iterator[tuple[str, Piece]]:
        piece = Piece(parameter, number, outputs, self._layout.is_transposed)
        yield f"{number}.{leaf}.weight", piece
        if self._layout.has_bias:
            yield f"{number}.{leaf}.bias", Piece(f"{parameter}_bias", number, outputs, False)


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
    for name in fused_experts(model):
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, kind(model.get_submodule(name)))


def fused_experts(model: nn.Module) -> dict[str, Layout]:
    """How experts lie in each module of fused ones that `separate` understands, by its path."""
    found = {name: layout_of(module) for name, module in model.named_modules()}
    return {name: layout for name, layout in found.items() if layout is not None}


def experts_in(module: nn.Module) -> Mapping[str, Experts]:
    """All `Experts` inside of ``module``, by their paths there."""
    return {path: part for path, part in module.named_modules() if isinstance(part, Experts)}
