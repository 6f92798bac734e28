"""Turning modules into parts of the native decoder: matrices, norms and activations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn

from quantine.activations.modules import GriddedLinear, PermutedNorm
from quantine.families.layers import INPUTS_NAME, is_transposed
from quantine.kernels.matrix import float_matrix
from quantine.runtime.decoder_checks import Classes, expect, refuse
from quantine.runtime.decoder_heads import Slice
from quantine.runtime.decoder_rounding import Roundings
from quantine.runtime.modules import QuantEmbedding, QuantLinear, TiedHead
from quantine.runtime.rounding_norm import RoundingNorm

ACTIVATIONS: Final = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "BloomGelu": "gelu_tanh",
}
"""Native names of activation functions by the name of their class in torch or transformers."""
PROBE: Final = (-9.0, 9.0, 37)
"""First and last value at which an activation function is compared, and how many there are."""
CLOSE: Final = 1e-5
"""Largest difference of an activation function from the native one, at these values."""

SCALED: Final = "TextScaledWordEmbedding"
"""What the names of embeddings end with that multiply their rows by a factor."""
LINEAR: Final = "FalconLinear"
"""A class of transformers that multiplies as ``nn.Linear`` does."""


@dataclass(frozen=True)
class Parts:
    """Turns modules into parts of the native decoder.

    Attributes:
        native: the module ``quantine._native``.
        classes: the classes that transformers defines for the model.
        roundings: turns the modules that round activations into parts.
        matrices: native matrices by the identity of the float weight, so that a weight which two
            modules share becomes one matrix.
    """

    native: ModuleType
    classes: Classes
    roundings: Roundings
    matrices: dict[int, Any] = field(default_factory=dict)

    def linear(self, module: Any, part: Slice | None = None) -> Any:
        """The native ``Linear`` of a module with a matrix.

        Args:
            module: a ``nn.Linear``, ``Conv1D``, ``FalconLinear``, `GriddedLinear` or
                `QuantLinear`.
            part: the outputs that are wanted; ``None`` for all.

        Raises:
            BackendUnavailable: it is something else, or rounds its inputs in a way that is not
                known.
        """
        from transformers.pytorch_utils import Conv1D

        own = self.classes.home.__dict__.get(LINEAR)
        if type(module) not in (nn.Linear, Conv1D, own, GriddedLinear, QuantLinear):
            refuse(f"a matrix is in a {type(module).__name__}")
        inputs = getattr(module, INPUTS_NAME, None)
        if inputs is None:
            return self._linear(module, module.bias, part=part)
        return self._linear(
            module,
            module.bias,
            {INPUTS_NAME},
            part,
            rounding=self.roundings.inputs(inputs, module.in_features),
            integers=module.input_grid() if type(module) is QuantLinear else None,
        )

    def head(self, module: nn.Module, embedding: nn.Module) -> Any:
        """The native ``Linear`` of an output head, which may share the table of ``embedding``.

        Raises:
            BackendUnavailable: it is something else, or shares another table.
        """
        if type(module) is not TiedHead:
            return self.linear(module)
        expect(module, TiedHead, "the head", ())
        if module.table is not embedding:
            refuse("the head shares a table that the embedding does not have")
        return self._linear(embedding, module.bias)

    def _linear(
        self,
        module: nn.Module,
        bias: Tensor | None,
        children: Iterable[str] = (),
        part: Slice | None = None,
        **rounded: Any,
    ) -> Any:
        if bias is not None:
            bias = vector(bias if part is None else bias[part.indices()])
        found = None if part is None else self.native.Slice(*part)
        return self.native.Linear(self._matrix(module, children), bias, slice=found, **rounded)

    def embedding(self, module: Any) -> tuple[Any, float]:
        """The native matrix of a token embedding, and the factor on its rows.

        Raises:
            BackendUnavailable: it is of an unknown class, or rescales its rows.
        """
        kind = type(module)
        if kind is QuantEmbedding:
            return self._matrix(module), module.factor
        if kind is nn.Embedding:
            return self.table(module), 1.0
        if kind is not self.classes.home.__dict__.get(f"{self.classes.prefix}{SCALED}"):
            refuse(f"the embedding is a {kind.__name__}")
        return self.table(module), float(module.embed_scale.to(module.weight.dtype))

    def table(self, module: Any) -> Any:
        """The native matrix of an embedding with float rows.

        Raises:
            BackendUnavailable: rows are rescaled when they are looked up.
        """
        if module.max_norm is not None:
            refuse("an embedding rescales its rows (max_norm)")
        return self._matrix(module)

    def _matrix(self, module: Any, children: Iterable[str] = ()) -> Any:
        expect(module, type(module), "a matrix", children)
        if not isinstance(module, QuantLinear | QuantEmbedding):
            weight = module.weight
            if id(weight) not in self.matrices:
                stored = weight.detach()
                plain = stored.T.contiguous() if is_transposed(module) else stored
                self.matrices[id(weight)] = float_matrix(plain)
            return self.matrices[id(weight)]
        matrix = module.matrix()
        if matrix is None:
            refuse("grids of llama.cpp's types with a K or a minimum have no native kernel")
        return matrix

    def norm(
        self, module: Any, plus_one: bool = False, smaller: float = 1.0, factor: float = 1.0
    ) -> Any:
        """The native ``Norm`` of a ``nn.LayerNorm`` or of the model's own RMS norm.

        It may be in a `PermutedNorm`, also in one that rounds on GPUs.

        Args:
            plus_one: whether the model's own norm multiplies by ``1 + weight``, as Gemma's does.
            smaller: what the inputs of the model's own norm are divided by beforehand.
            factor: on its outputs.

        Raises:
            BackendUnavailable: it is something else.
        """
        order = None
        if type(module) in (PermutedNorm, RoundingNorm):
            expect(module, type(module), "a norm", {"norm"})
            order, module = module.get_buffer("order").contiguous(), module.norm
        expect(module, type(module), "a norm", ())
        if type(module) is nn.LayerNorm:
            weight, bias = module.weight, module.bias
            width = module.normalized_shape
            return self.native.Norm(
                _or_filled(weight, 1.0, width),
                _or_filled(bias, 0.0, width),
                module.eps,
                order,
            )
        if type(module) is not self.classes.home.__dict__.get(f"{self.classes.prefix}RMSNorm"):
            refuse(f"a norm is a {type(module).__name__}")
        if plus_one:
            return self.native.Norm(vector(module.weight) + 1.0, None, module.eps, order)
        eps = module.variance_epsilon / smaller**2
        return self.native.Norm(vector(module.weight) * factor, None, eps, order)

    def activation(self, module: nn.Module) -> str:
        """The native name of an activation function.

        Raises:
            BackendUnavailable: there is none that computes the same.
        """
        from transformers import activations

        kind = type(module)
        name = ACTIVATIONS.get(kind.__name__)
        if name is None or kind not in (
            getattr(activations, kind.__name__, None),
            getattr(nn, kind.__name__, None),
            getattr(self.classes.home, kind.__name__, None),
        ):
            refuse(f"the activation is a {kind.__name__}")
        x = torch.linspace(*PROBE, dtype=torch.float32, device="cpu")
        found, wanted = x.clone(), module(x.clone())
        self.native.activate(name, found)
        if not torch.allclose(found, wanted, rtol=0.0, atol=CLOSE * PROBE[1]):
            refuse(f"the activation, a {kind.__name__}, computes something else than {name}")
        return name


def _or_filled(tensor: Tensor | None, value: float, size: tuple[int, ...]) -> Tensor:
    """``tensor`` as a native vector; one of ``value`` in its place where there is none."""
    if tensor is None:
        return torch.full(size, value, dtype=torch.float32, device="cpu")
    return vector(tensor)


def vector(tensor: Tensor) -> Tensor:
    """A vector as the native decoder takes it: float32 and contiguous."""
    return tensor.detach().float().contiguous()
