"""Recipes: how a tensor of the rotated model is made of tensors of the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantine.core.rotation import Rotation
from quantine.errors import CheckpointError

Read = Callable[[str], Tensor]
"""Gives a tensor of the original by its name, in the dtype in which it is stored."""


class Recipe(Protocol):
    """How one tensor of the rotated model is made."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the tensors of the original that `made` reads."""

    def made(self, read: Read) -> Tensor:
        """The tensor, contiguous, computed in float32 where it is not a constant.

        Raises:
            CheckpointError: the original has numbers of which it cannot be made.
        """


@dataclass(frozen=True)
class Turn:
    """A rotation of some channels of a longer axis.

    Attributes:
        rotation: turns each run of as many channels as it is wide.
        parts: number of equal parts of the axis.
        last: how many channels at the end of each part are turned, run by run; 0 turns all.
    """

    rotation: Rotation
    parts: int = 1
    last: int = 0

    def of(self, x: Tensor) -> Tensor:
        """``x`` ``[..., channels]``, its last axis turned, float32."""
        parts = x.reshape(*x.shape[:-1], self.parts, -1).float()
        kept = parts.shape[-1] - (self.last or parts.shape[-1])
        runs = parts[..., kept:].unflatten(-1, (-1, self.rotation.width))
        turned = self.rotation.turned(runs).flatten(-2)
        return torch.cat([parts[..., :kept], turned], -1).reshape(x.shape)


@dataclass(frozen=True)
class Gain:
    """The factors of a norm on its channels.

    Attributes:
        name: name of the weight of the norm.
        offset: what is added to the weight.
    """

    name: str
    offset: int

    def of(self, read: Read) -> Tensor:
        """The factors ``[channels]``, in float64."""
        return read(self.name).double() + self.offset


@dataclass(frozen=True)
class Matrix:
    """A matrix, whose inputs and outputs may be turned.

    Attributes:
        name: its name.
        transposed: whether it is stored as ``[in, out]``.
        gain: factors of a norm on its inputs; ``None`` if there are none.
        inputs: turns its inputs.
        outputs: turns its outputs.
    """

    name: str
    transposed: bool = False
    gain: Gain | None = None
    inputs: Turn | None = None
    outputs: Turn | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Recipe`."""
        return (self.name, *([self.gain.name] if self.gain else []))

    def made(self, read: Read) -> Tensor:
        """See `Recipe`."""
        matrix = read(self.name)
        matrix = (matrix.T if self.transposed else matrix).float()
        if self.gain:
            matrix = matrix * self.gain.of(read).float()
        if self.inputs is not None:
            matrix = self.inputs.of(matrix)
        if self.outputs is not None:
            matrix = self.outputs.of(matrix.T).T
        return (matrix.T if self.transposed else matrix).contiguous()


@dataclass(frozen=True)
class Bias:
    """The bias of a matrix.

    Attributes:
        name: its name.
        matrix: the matrix and how its outputs are turned.
        shift: name of the bias of the norm before, which goes into this one; empty if none does.
    """

    name: str
    matrix: Matrix
    shift: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Recipe`."""
        return (self.name, *([self.shift, self.matrix.name] if self.shift else []))

    def made(self, read: Read) -> Tensor:
        """See `Recipe`."""
        bias = read(self.name).double()
        if self.shift:
            matrix = read(self.matrix.name)
            matrix = matrix.T if self.matrix.transposed else matrix
            bias = bias + matrix.double() @ read(self.shift).double()
        turn = self.matrix.outputs
        return bias.float() if turn is None else turn.of(bias)


@dataclass(frozen=True)
class Constant:
    """The weight or bias of a norm that matrices have taken over: one number everywhere.

    Attributes:
        name: its name.
        value: the number.
    """

    name: str
    value: float

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Recipe`."""
        return (self.name,)

    def made(self, read: Read) -> Tensor:
        """See `Recipe`."""
        return torch.full_like(read(self.name), self.value)


@dataclass(frozen=True)
class Shift:
    """The bias of a norm whose matrices have none, behind which the weight is multiplied now.

    Attributes:
        name: its name.
        gain: factors of the norm; ``None`` if it has none.
        turn: turns hidden states.
    """

    name: str
    gain: Gain | None
    turn: Turn

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Recipe`."""
        return (self.name, *([self.gain.name] if self.gain else []))

    def made(self, read: Read) -> Tensor:
        """See `Recipe`."""
        bias = read(self.name).double()
        if self.gain:
            gain = self.gain.of(read)
            if bool(((gain == 0) & (bias != 0)).any()):
                raise CheckpointError(
                    f"{self.gain.name} is {-self.gain.offset} where {self.name} is not, and the "
                    "matrices behind have no bias, so that hidden states cannot be rotated: leave "
                    "out `rotate`"
                )
            bias = torch.where(bias == 0, bias, bias / gain)
        return self.turn.of(bias)
