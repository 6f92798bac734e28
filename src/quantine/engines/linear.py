"""A linear layer as engines have it: one or several matrices that read the same input.

Engines keep the matrices of q, k and v, or of gate and up, in one layer. Each keeps a scheme of its
own here, and so does one that a plan has left in floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quantine.core.ambient import without_autocast
from quantine.core.arithmetic import UNSTATED, Arithmetic
from quantine.core.qtensor import QTensor
from quantine.kernels import backend, integer
from quantine.kernels.integer.units.gridded_matrix import GriddedMatrix
from quantine.kernels.integer.units.inputs import InputUnits, Rounded
from quantine.kernels.matrix import FEW_ROWS, multiply, packed_matrix, product
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix
from quantine.runtime.input_grid import integer_grid
from quantine.runtime.modules import INTEGER_ROWS


class FloatPart:
    """A matrix that is not quantized.

    Args:
        weight: ``[out, in]`` of any float dtype.
        inputs: rounds the input first; ``None`` where it is not rounded.
    """

    def __init__(self, weight: Tensor, inputs: nn.Module | None = None) -> None:
        self.weight = weight
        self.inputs = inputs

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return len(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``x`` ``[rows, in]`` to ``[rows, out]`` of the same dtype."""
        x = x if self.inputs is None else self.inputs(x)
        return linear(x, self.weight.to(x.dtype))


class PackedPart:
    """A quantized matrix, held as the kernels of its device read it, and in no other form.

    Args:
        qtensor: the matrix, on the device that computes.
        arithmetic: of products on the CPU, see `quantine.kernels.matrix`.
        inputs: rounds the input first, one of `quantine.activations.grids`; ``None`` where it is
            not rounded.
    """

    def __init__(
        self, qtensor: QTensor, arithmetic: Arithmetic, inputs: nn.Module | None = None
    ) -> None:
        self.out_features = len(qtensor.codes)
        self.arithmetic = arithmetic
        self.inputs = inputs
        self.grid: Any = None if inputs is None else integer_grid(inputs, qtensor)
        gridded = isinstance(self.grid, GriddedMatrix)
        self.matrix: Any = None if gridded else packed_matrix(qtensor)
        self._too_small = qtensor.grid.exponent != 0 and not gridded
        self._decoded = qtensor if self.matrix is None and not gridded else None

    @property
    def is_plain(self) -> bool:
        """Whether a native product of the matrix with the input as it is is all there is to do."""
        native = self.matrix is not None and not isinstance(self.matrix, UnitMatrix)
        return native and self.inputs is None and not self._too_small

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``x`` ``[rows, in]`` float32, bfloat16 or float16 to ``[rows, out]`` of its dtype."""
        if self._too_small and x.dtype == torch.float16:
            return self(x.float()).to(x.dtype)  # float16 would not hold the weights
        if isinstance(self.grid, GriddedMatrix):
            return self.of_codes(x, integer.rounded(x, self.grid.inputs))
        if self.grid is not None and len(x) >= INTEGER_ROWS:
            return integer.multiply(self.matrix, self.grid, x.float().contiguous()).to(x.dtype)
        x = x if self.inputs is None else self.inputs(x)
        if self._decoded is not None:
            return linear(x, self._decoded.dequantize().to(x.dtype))
        return product(self.matrix, x, self.arithmetic)

    @property
    def rounds(self) -> InputUnits | None:
        """How a GPU's programs round the input; ``None`` where no such programs multiply it."""
        return self.grid.inputs if isinstance(self.grid, GriddedMatrix) else None

    def of_codes(self, x: Tensor, rounded: Rounded) -> Tensor:
        """As calling it with ``x``, whose codes ``rounded`` are, made as `rounds` says."""
        return integer.multiply_rounded(self.grid, rounded, x.dtype)


class FusedLinear:
    """Matrices with the same input, whose outputs stand one after another.

    On a GPU, parts that round the input alike share its codes, which are made once in a call.

    Args:
        parts: the matrices.
        input_order: ``[in]`` integers: the matrices read channel ``input_order[j]`` as input ``j``,
            for a norm that writes its channels reordered; ``None`` for the order they come in.
        output_order: ``[out]`` int64: place ``j`` of the result gets output ``output_order[j]``;
            ``None`` for the order they are computed in.
    """

    def __init__(
        self,
        parts: Sequence[FloatPart | PackedPart],
        input_order: Tensor | None = None,
        output_order: Tensor | None = None,
    ) -> None:
        self.parts = list(parts)
        self.input_order, self.output_order = input_order, output_order
        packed = [part for part in self.parts if isinstance(part, PackedPart) and part.is_plain]
        arithmetics = {part.arithmetic for part in packed}
        together = len(self.parts) == len(packed) > 1 and len(arithmetics) == 1
        self._together = [part.matrix for part in packed] if together else []
        self._arithmetic = packed[0].arithmetic if together else UNSTATED
        self._codes_of = _alike(self.parts)

    @property
    def out_features(self) -> int:
        """Number of outputs of all matrices."""
        return sum(part.out_features for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``x`` ``[rows, in]`` float32, bfloat16 or float16 to ``[rows, out]`` of its dtype."""
        with without_autocast(x.device):
            if self.input_order is not None:
                x = x.index_select(1, self.input_order)
            found = self._products(x)
            return found if self.output_order is None else found.index_select(1, self.output_order)

    def _products(self, x: Tensor) -> Tensor:
        if self._together and len(x) <= FEW_ROWS and backend.of(x) == "native":
            results = multiply(self._together, x.float().contiguous(), self._arithmetic)
            return torch.cat(results, 1).to(x.dtype)
        codes: dict[int, Rounded] = {}
        results = []
        for part, first in zip(self.parts, self._codes_of, strict=True):
            if isinstance(part, PackedPart) and part.rounds is not None:
                if first not in codes:
                    codes[first] = integer.rounded(x, part.rounds)
                results.append(part.of_codes(x, codes[first]))
            else:
                results.append(part(x))
        return results[0] if len(results) == 1 else torch.cat(results, 1)


def _alike(parts: Sequence[FloatPart | PackedPart]) -> list[int]:
    """For each part the number of the first one that rounds its input to the same codes."""
    rounds = [part.rounds if isinstance(part, PackedPart) else None for part in parts]

    def first(number: int) -> int:
        own = rounds[number]
        if own is None:
            return number
        return next(n for n, other in enumerate(rounds) if other is not None and other.equals(own))

    return [first(number) for number in range(len(parts))]
