"""What the layout of another engine offers: what it holds, and how it is written and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from torch import Tensor

from quantine.core.activation_spec import ActivationSpec
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.families.layers import Role
from quantine.source.tensor_files import TensorFiles

if TYPE_CHECKING:
    import torch

WEIGHTS_ONLY: Final = (
    "it rounds activations, which this layout does not hold: quantize weights only"
)
"""Why a layout that says nothing of activations refuses models that round them."""


@dataclass(frozen=True)
class Matrix:
    """One quantized matrix, as far as it matters to whether a layout holds it.

    A plan knows all of it before anything runs, so a plan and an export are refused for the same
    reasons.

    Attributes:
        name: of the layer.
        role: its place in the model.
        spec: its grid.
        out_features, in_features: its shape.
        outliers: whether it has outliers, or may have.
        ordered: whether its columns are stored in another order than the inputs'.
        transposed: whether the model stores its weight as ``[in, out]`` (GPT-2's Conv1D).
        biased: whether its module has a bias.
        rounded: whether its input is rounded; of matrices outside of blocks: whether the model
            rounds any.
    """

    name: str
    role: Role
    spec: QuantSpec
    out_features: int
    in_features: int
    outliers: bool = False
    ordered: bool = False
    transposed: bool = False
    biased: bool = False
    rounded: bool = False


@dataclass(frozen=True)
class Exportable:
    """A quantized model that is to be written in the layout of another engine.

    Tensors are read when they are asked for, so that whoever goes from one to the next has one in
    memory.

    Attributes:
        directory: of the tokenizer and other small files.
        config: the model's configuration, in its float form.
        settings: the same as the plain values of ``config.json``.
        model: of the configuration, without weights.
        matrices: those that are quantized, by name, in running order.
        floats: names of the tensors that are not.
        kept_linears: names of the Linear modules that are not quantized.
        read: gives a matrix: quantized, or in floats ``[out, in]`` where the layout gets it so.
        read_float: gives a tensor that is not quantized, as it is to be stored.
        dtype: of floats, and in which engines are to compute; ``None`` leaves it to the layout.
        activations: how they are rounded; ``None`` where they are not.
        read_grid: gives the tensors of the static grid of a matrix's input, by name; none where it
            has no such grid.
    """

    directory: Path
    config: Any
    settings: Mapping[str, Any]
    model: Any
    matrices: Mapping[str, Matrix]
    floats: Sequence[str]
    kept_linears: Sequence[str]
    read: Callable[[str], QTensor | Tensor]
    read_float: Callable[[str], Tensor]
    dtype: torch.dtype | None = None
    activations: ActivationSpec | None = None
    read_grid: Callable[[str], Mapping[str, Tensor]] = lambda _: {}


class Readable(TensorFiles, Protocol):
    """A checkpoint of another engine, opened to be read tensor by tensor.

    As `TensorFiles` it is a model in floats, with the names of the model.
    """

    @property
    def settings(self) -> Mapping[str, Any]:
        """``config.json`` of the float model, as plain values."""
        ...

    @property
    def specs(self) -> Mapping[str, QuantSpec]:
        """The grid of each quantized matrix, by the name of its layer, in the model's words."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """``(out, in)`` of each quantized matrix."""
        ...

    @property
    def floats(self) -> Sequence[str]:
        """Names of the other tensors, in the model's words."""
        ...

    @property
    def decoded(self) -> Sequence[str]:
        """Names of the layers among these that are packed, but on no grid of quantine's."""
        ...

    def is_transposed(self, name: str) -> bool:
        """Whether the model stores the weight of layer ``name`` as ``[in, out]``."""
        ...

    def qtensor(self, name: str) -> QTensor:
        """The matrix of layer ``name``: the same numbers as in the file."""
        ...

    def float_tensor(self, name: str) -> Tensor:
        """The tensor ``name``, which is not quantized."""
        ...


class Target(Protocol):
    """The layout of another engine, a row of `quantine.formats.foreign.FOREIGN`."""

    @property
    def decodes(self) -> bool:
        """Whether it gets every matrix decoded, in floats."""
        ...

    @property
    def needs_quantized(self) -> bool:
        """Whether its files must hold a quantized matrix: nobody reads them if all are floats."""
        ...

    @property
    def float_dtype(self) -> torch.dtype | None:
        """Dtype that every float beside packed matrices must have; ``None`` where any will do."""
        ...

    def model_refusal(self, config: Any) -> str | None:
        """Why no model of this architecture and configuration can be held; ``None`` if it can."""
        ...

    def activations_refusal(self, activations: ActivationSpec) -> str | None:
        """Why no model that rounds its activations like this can be held; ``None`` if it can."""
        ...

    def refusal(self, matrix: Matrix) -> str | None:
        """Why a matrix cannot be held without loss; ``None`` if it can.

        It may still turn out that numbers do not fit, such as scales too small for float16.
        """
        ...

    def nearest(self, matrix: Matrix) -> QuantSpec | None:
        """The grid nearest to that of a refused matrix; ``None`` leaves the matrix in floats."""
        ...

    def write(self, source: Exportable, out: Path) -> list[str]:
        """Write the model into the empty directory ``out``; returns what its users have to know.

        Raises:
            FormatError: numbers do not fit; the message names the layer.
        """
        ...
