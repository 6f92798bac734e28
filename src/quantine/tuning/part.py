"""What is tuned at once: numbers of matrices and vectors, in the model that computes with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from quantine.families.layers import Layer
from quantine.tuning.matrix import TunedMatrix
from quantine.tuning.numbers import Numbers

WARM_UP: Final = 0.1
"""Share of the steps in which the rate rises."""
BETAS: Final = (0.9, 0.98)
"""How slowly Adam forgets gradients and their squares."""


@dataclass(frozen=True)
class Snapshot:
    """Numbers and codes at one time; what codes would change to is not part of it."""

    leaves: list[Tensor]
    codes: list[Tensor]


class Part:
    """Matrices and vectors of a model, the whole or a block, whose numbers are tuned together.

    Args:
        model: computes with them.
        matrices: the numbers of the quantized matrices.
        vectors: those of norms and biases, by name in the model.

    Attributes:
        matrices, vectors: as given.
    """

    def __init__(
        self,
        model: nn.Module,
        matrices: Mapping[Layer, TunedMatrix],
        vectors: Mapping[str, Numbers],
    ) -> None:
        self._model = model
        self.matrices = matrices
        self.vectors = vectors

    def leaves(self) -> list[Tensor]:
        """The leaves of all numbers that are tuned, in an order that does not change."""
        matrices = [n for matrix in self.matrices.values() for n in matrix.numbers.values()]
        return [numbers.moved for numbers in (*matrices, *self.vectors.values())]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the model that hold what is tuned."""
        names = {layer.stored_name for layer in self.matrices} | set(self.vectors)
        return [self._model.get_parameter(name) for name in sorted(names)]

    @torch.no_grad()
    def install(self) -> None:
        """Let the model compute with the numbers as they are now."""
        for layer, matrix in self.matrices.items():
            parameter = self._model.get_parameter(layer.stored_name)
            layer.part_of(parameter).copy_(matrix.weight())
        for name, numbers in self.vectors.items():
            self._model.get_parameter(name).copy_(numbers.now())

    def pass_gradients(self) -> None:
        """Hand the gradients of the model's parameters on to `leaves`, and clear them."""
        for layer, matrix in self.matrices.items():
            gradient = self._model.get_parameter(layer.stored_name).grad
            if gradient is not None:
                with torch.enable_grad():
                    matrix.weight().backward(layer.part_of(gradient).float())
        for name, numbers in self.vectors.items():
            gradient = self._model.get_parameter(name).grad
            if gradient is not None:
                with torch.enable_grad():
                    numbers.now().backward(gradient)
        for parameter in self.parameters():
            parameter.grad = None

    def snapshot(self) -> Snapshot:
        """What `restore` takes."""
        leaves = [leaf.detach().clone() for leaf in self.leaves()]
        return Snapshot(leaves, [matrix.codes for matrix in self.matrices.values()])

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot of this part, on any device, and let the model compute with it."""
        for leaf, value in zip(self.leaves(), snapshot.leaves, strict=True):
            leaf.copy_(value)
        for matrix, codes in zip(self.matrices.values(), snapshot.codes, strict=True):
            matrix.replace_codes(codes.to(matrix.codes.device))
        self.install()


class Descent:
    """Steps along gradients, by Adam, whose rate rises and then falls along a cosine.

    Args:
        part: what is tuned.
        rate: see `quantine.core.tuning_spec.Tuning.rate`.
        steps: number of steps that will be made.
    """

    def __init__(self, part: Part, rate: float, steps: int) -> None:
        self._part = part
        self._rate = rate
        self._steps = steps
        self._made = 0
        self._adam = torch.optim.Adam(part.leaves(), lr=0.0, betas=BETAS)

    def step(self) -> None:
        """Follow the gradients that the model's parameters have, and clear them."""
        self._made += 1
        for group in self._adam.param_groups:
            group["lr"] = self._rate * pace(self._made, self._steps)
        self._part.pass_gradients()
        self._adam.step()
        self._adam.zero_grad()
        self._part.install()


def pace(step: int, steps: int) -> float:
    """The share of the rate that step number ``step`` of ``steps`` has."""
    rising = max(1, round(steps * WARM_UP))
    if step < rising:
        return step / rising
    return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / (steps - rising + 1))
