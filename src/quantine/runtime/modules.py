"""Modules of a model that hold packed weights and compute with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from quantine.activations.grids import StaticGrid, TokenGrid
from quantine.core.ambient import without_autocast
from quantine.core.arithmetic import UNSTATED, Arithmetic
from quantine.core.fixed_dtypes import FixedDtypes
from quantine.core.overrides import is_overridden
from quantine.core.spec import QuantSpec
from quantine.errors import FormatError
from quantine.families.layers import multiplied_input
from quantine.formats import format_named
from quantine.kernels import backend, integer
from quantine.kernels.integer.input_grid import InputGrid
from quantine.kernels.matrix import packed_matrix, product
from quantine.runtime.snapshot import Snapshot

INTEGER_ROWS: Final = 12
"""Number of rows of rounded activations from which integer products are faster than float ones.
With fewer, unpacking weights to bytes costs more than it saves."""
COMPUTED: Final = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""Dtypes of activations that native products accept."""


class Packed(FixedDtypes):
    """A packed matrix ``[out, in]``, its tensors kept as buffers of the module.

    The buffers keep their dtypes when a model is cast.

    Args:
        format_name: name of the packed layout, in `quantine.formats.FORMATS`.
        spec: bits and groups of the matrix.
        out_features, in_features: shape of the matrix.
        tensors: the layout's packed tensors by name, or tensors of their shapes on the meta device.

    Attributes:
        arithmetic: arithmetic of products, see `quantine.kernels.matrix`; may be changed at any
            time.
    """

    def __init__(
        self,
        format_name: str,
        spec: QuantSpec,
        out_features: int,
        in_features: int,
        tensors: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self.format_name = format_name
        self.spec = spec
        self.out_features = out_features
        self.in_features = in_features
        self.arithmetic: Arithmetic = UNSTATED
        self.tensor_names = self.fixed_names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._made_from: Snapshot | None = None
        self._matrix: Any = None

    def packed_tensors(self) -> dict[str, Tensor]:
        """The packed tensors by their name in the layout."""
        return {name: self.get_buffer(name) for name in self.tensor_names}

    def check(self, name: str) -> None:
        """Refuse packed tensors, as they were read from files, that hold no matrix of this shape.

        Args:
            name: full name of this module, for errors.

        Raises:
            FormatError: names the tensor, see `quantine.formats.format.Format.check`.
        """
        shape = (self.out_features, self.in_features)
        try:
            format_named(self.format_name).check(self.packed_tensors(), self.spec, *shape)
        except FormatError as error:
            raise FormatError(f"{name} is damaged: {error}") from error

    def dequantize(self) -> Tensor:
        """The matrix decoded to float32, ``[out, in]``, columns in the model's order of inputs."""
        layout = format_named(self.format_name)
        return layout.unpack(self.packed_tensors(), self.spec, self.in_features).dequantize()

    def matrix(self) -> Any:
        """The native matrix, or ``None`` where `quantine.kernels.matrix.packed_matrix` has none.

        It is made at first use, and again when a packed tensor is replaced or written to.
        """
        packed = self.packed_tensors()
        if self._made_from is None or not self._made_from.holds(packed.values()):
            layout = format_named(self.format_name)
            qtensor = layout.unpack(packed, self.spec, self.in_features)
            self._matrix = packed_matrix(qtensor)
            self._made_from = Snapshot(packed.values())
        return self._matrix

    def product(self, x: Tensor) -> Tensor:
        """``x @ W.T``, with ``W`` the packed matrix.

        Few rows are multiplied straight with the codes, with weights decoded in registers and sums
        in float32. More are multiplied by PyTorch, with weights decoded before, see
        `quantine.kernels.matrix.product`. The whole matrix is decoded by PyTorch where no kernel
        reads it, where gradients are needed or the computation is recorded, and for float64.

        Autocast changes nothing: like a function that it does not list, this computes in the dtype
        of its input.

        Args:
            x: ``[..., in]`` of any float dtype.

        Returns:
            ``[..., out]`` in the dtype of ``x``.
        """
        with without_autocast(x.device):
            return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16 and "exponent" in self.tensor_names:
            return self._product(x.float()).to(x.dtype)  # float16 would not hold the weights
        matrix = self.matrix() if _takes_kernels(x) else None
        if matrix is None:
            return linear(x, self.dequantize().to(x.dtype))
        rows = product(matrix, x.reshape(-1, self.in_features), self.arithmetic)
        return rows.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """One line for ``print(model)``: shape, layout and spec."""
        return f"{self.in_features} -> {self.out_features}, {self.format_name}, {self.spec}"

    def __getstate__(self) -> dict[str, Any]:
        """The state without the native matrix: copies make one of their own."""
        return {**self.__dict__, "_matrix": None, "_made_from": None}


class QuantLinear(Packed):
    """A linear layer ``y = x @ W.T + bias`` with ``W`` packed.

    Inputs may be rounded first. With `INTEGER_ROWS` rows or more, and where no group of weights
    spans several clusters of inputs, codes of activations and weights are then multiplied as
    integers, see `quantine.kernels.integer`. Else rounded activations are floats, and
    `Packed.product` multiplies.

    Args:
        format_name, spec, out_features, in_features, tensors: as for `Packed`.
        bias: ``[out]``, or ``None``.

    Attributes:
        inputs: the module that rounds ``x`` first; ``None`` where ``x`` is not rounded.
    """

    def __init__(
        self,
        format_name: str,
        spec: QuantSpec,
        out_features: int,
        in_features: int,
        tensors: dict[str, Tensor],
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__(format_name, spec, out_features, in_features, tensors)
        self.bias = bias
        self.inputs: nn.Module | None = None
        self._gridded_from: Snapshot | None = None
        self._grid: Any = None

    def input_grid(self) -> Any:
        """The native grid of the inputs, or ``None`` where floats have to be multiplied.

        They have to be where inputs are rounded by anything else than a plain grid.

        It is made at first use, and again when a tensor of the grid or of the matrix is replaced or
        written to.
        """
        inputs: Any = self.inputs
        if type(inputs) not in (StaticGrid, TokenGrid) or is_overridden(inputs):
            return None
        found = [*inputs.buffers(), *self.packed_tensors().values()]
        if self._gridded_from is None or not self._gridded_from.holds(found):
            self._grid = self._made_grid(inputs)
            self._gridded_from = Snapshot(found)
        return self._grid

    def _made_grid(self, inputs: StaticGrid | TokenGrid) -> Any:
        layout = format_named(self.format_name)
        qtensor = layout.unpack(self.packed_tensors(), self.spec, self.in_features)
        if not integer.multiplies_integers(qtensor):
            return None
        grid: InputGrid | None = InputGrid(inputs.bits)
        if isinstance(inputs, StaticGrid):
            channels = inputs.of_channels()
            grid = InputGrid.of_channels(inputs.bits, *channels, qtensor, inputs.reached())
        return None if grid is None else integer.native_grid(grid)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` ``[..., in]`` of any float dtype to ``[..., out]`` of the same dtype."""
        rows = x.reshape(-1, self.in_features)
        many = len(rows) >= INTEGER_ROWS and _takes_kernels(x)
        grid = self.input_grid() if many else None
        if grid is None:
            product = self.product(multiplied_input(self, x))
        else:
            rows = rows.float().contiguous()
            product = integer.multiply(self.matrix(), grid, rows).to(x.dtype)
            product = product.view(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        """One line for ``print(model)``: shape, spec, and how rounded inputs are multiplied."""
        shown = super().extra_repr()
        if self.inputs is None:
            return shown
        return f"{shown}, {'floats' if self.input_grid() is None else 'integers'}"

    def __getstate__(self) -> dict[str, Any]:
        """The state without the native grid: copies make one of their own."""
        return {**super().__getstate__(), "_grid": None, "_gridded_from": None}


def _takes_kernels(x: Tensor) -> bool:
    """Whether kernels can multiply ``x``.

    There must be some for its device, it must be of a dtype in `COMPUTED`, and PyTorch must neither
    need its gradient nor record the computation.
    """
    wanted = torch.is_grad_enabled() and x.requires_grad
    if wanted or x.dtype not in COMPUTED or backend.is_recorded():
        return False
    return backend.of(x) != "reference"


class QuantEmbedding(Packed):
    """A token embedding whose table ``[tokens, width]`` is packed; only rows looked up are decoded.

    Args:
        format_name, spec, out_features, in_features, tensors: as for `Packed`; ``out_features`` is
            the number of tokens, ``in_features`` the width.
        scale: factor on every row (Gemma scales its embeddings).
        dtype: dtype of the result until the model is cast.
    """

    def __init__(
        self,
        format_name: str,
        spec: QuantSpec,
        out_features: int,
        in_features: int,
        tensors: dict[str, Tensor],
        scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(format_name, spec, out_features, in_features, tensors)
        self.factor = scale  # `scale` is the name of a packed tensor
        # Follows the model's dtype, which an embedding decides for all that comes after it.
        follows = torch.empty(0, dtype=dtype, device=next(iter(tensors.values())).device)
        self.register_buffer("output_like", follows, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids ``[...]`` to their rows ``[..., in]``, in the model's dtype."""
        dtype = self.get_buffer("output_like").dtype
        used, inverse = torch.unique(tokens, return_inverse=True)
        layout = format_named(self.format_name)
        rows = layout.unpack(self.packed_tensors(), self.spec, self.in_features, used)
        result = embedding(inverse, rows.dequantize().to(dtype))
        return result if self.factor == 1.0 else result * result.new_tensor(self.factor)


class TiedHead(nn.Module):
    """An output head that shares the packed table of a token embedding.

    Args:
        table: the embedding.
        bias: ``[tokens]``, or ``None``.
    """

    def __init__(self, table: QuantEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.bias = bias
        # In a list, so that the table is registered, saved and moved once, as the embedding.
        self._table = [table]

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states ``[..., in]`` to logits ``[..., tokens]`` of the same dtype."""
        product = self._table[0].product(x)
        return product if self.bias is None else product + self.bias.to(x.dtype)

    @property
    def table(self) -> QuantEmbedding:
        """The embedding whose table is shared."""
        return self._table[0]


def packed_modules(model: nn.Module) -> Iterable[tuple[str, Packed]]:
    """Every packed module of ``model``, as pairs of its full name and the module."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Packed))
