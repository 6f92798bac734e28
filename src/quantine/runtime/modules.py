"""Modules of a model that hold packed weights and compute with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from quantine.core.spec import QuantSpec
from quantine.families.layers import multiplied_input
from quantine.formats import format_named
from quantine.kernels import backend, integer
from quantine.kernels.integer.units.gridded_matrix import GriddedMatrix
from quantine.kernels.matrix import rows_of
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix
from quantine.runtime.device_map import is_loaded_per_call
from quantine.runtime.input_grid import integer_grid, is_plain_grid
from quantine.runtime.packed import Packed, takes_kernels
from quantine.runtime.recorded import is_compiled, look_up
from quantine.runtime.shared_input import SharedInput
from quantine.runtime.snapshot import Snapshot

INTEGER_ROWS: Final = 12
"""Number of rows of rounded activations from which integer products are faster than float ones.
With fewer, unpacking weights to bytes costs more than it saves."""


class QuantLinear(Packed):
    """A linear layer ``y = x @ W.T + bias`` with ``W`` packed.

    Inputs may be rounded first. With `INTEGER_ROWS` rows or more (on a GPU, with any number), and
    where no group of weights spans several clusters of inputs, codes of activations and weights are
    then multiplied as integers, see `quantine.kernels.integer`. Else rounded activations are
    floats, and `Packed.product` multiplies.

    Args:
        format_name, spec, out_features, in_features, tensors: as for `Packed`.
        bias: ``[out]``, or ``None``.

    Attributes:
        inputs: the module that rounds ``x`` first; ``None`` where ``x`` is not rounded.
        shared: what a GPU's programs get codes of ``x`` from that another matrix may have made;
            ``None`` where no other reads ``x``.
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
        self.shared: SharedInput | None = None
        self._gridded_from: Snapshot | None = None
        self._gridded_for: torch.device | None = None
        self._grid: Any = None

    def input_grid(self, device: torch.device | None = None) -> Any:
        """What the inputs are multiplied with in integers, or ``None`` where floats have to be.

        See `quantine.runtime.input_grid.integer_grid`. It is made at first use, and again when a
        tensor of the grid or of the matrix is replaced or written to, or for another device.

        Args:
            device: ``None`` is that of the grid made last, or where the numbers of ``inputs`` are:
                packed tensors may have stayed on the CPU.
        """
        if not is_plain_grid(self.inputs):
            return None
        found = [*self.inputs.buffers(), *self.packed_tensors().values()]
        place = device or self._gridded_for or found[0].device
        fresh = self._gridded_from is not None and self._gridded_from.holds(found)
        if not fresh or place != self._gridded_for:
            self._grid = None  # frees its memory
            packed = self._packed_on(place)
            self._grid = integer_grid(self.inputs, self._unpacked(packed))
            self._gridded_for = place
            if isinstance(self._grid, GriddedMatrix):
                if self.shared is not None:
                    self._grid = replace(self._grid, inputs=self.shared.one_of(self._grid.inputs))
                self._leave_to_programs(packed, place)
            found = [*self.inputs.buffers(), *self.packed_tensors().values()]
            self._gridded_from = Snapshot(found)
        return self._grid

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` ``[..., in]`` of any float dtype to ``[..., out]`` of the same dtype."""
        if self.inputs is not None and is_compiled(x):
            product = self._operated(x, rounds=True)
        else:
            product = self._rounded_product(x, self.shared)
        return product if self.bias is None else product + self.bias.to(x.dtype)

    def rounded_product(self, x: Tensor) -> Tensor:
        """The product with ``x`` ``[..., in]``, which is rounded first if inputs are.

        Its codes are not shared: compiled programs write to tensors without counting it.
        """
        return self._rounded_product(x, None)

    def _rounded_product(self, x: Tensor, shared: SharedInput | None) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        taken = self.inputs is not None and takes_kernels(x)
        if taken and backend.of(x) == "native":
            taken = len(rows) >= INTEGER_ROWS
        grid = self.input_grid(x.device) if taken else None
        if grid is None:
            return self.product(multiplied_input(self, x))
        if isinstance(grid, GriddedMatrix):
            if shared is None:
                rounded = integer.rounded(rows, grid.inputs)
            else:
                rounded = shared.rounded(x, grid.inputs, self._number)
            product = integer.multiply_rounded(grid, rounded, x.dtype)
        else:
            rows = rows.float().contiguous()
            product = integer.multiply(self.matrix(x.device), grid, rows).to(x.dtype)
        return product.view(*x.shape[:-1], self.out_features)

    def _forget(self) -> None:
        super()._forget()
        self._grid = self._gridded_from = self._gridded_for = None

    def extra_repr(self) -> str:
        """One line for ``print(model)``: shape, spec, and how rounded inputs are multiplied."""
        shown = super().extra_repr()
        if self.inputs is None:
            return shown
        return f"{shown}, {'floats' if self.input_grid() is None else 'integers'}"

    def __getstate__(self) -> dict[str, Any]:
        """The state without the grid of kernels: copies make one of their own."""
        none = {"_grid": None, "_gridded_from": None, "_gridded_for": None}
        return {**super().__getstate__(), **none}


class QuantEmbedding(Packed):
    """A token embedding whose table ``[tokens, width]`` is packed; only rows looked up are decoded.

    They are looked up in the packed tensors, which stay on the model's device. Where the table is
    the head, too, and a GPU's programs read it, they are looked up in what these read, and the
    packed tensors go to the CPU as those of other matrices do, unless there are outliers.

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
        self.leaves_gpus = False
        self.factor = scale  # `scale` is the name of a packed tensor
        # Follows the model's dtype, which an embedding decides for all that comes after it.
        follows = torch.empty(0, dtype=dtype, device=next(iter(tensors.values())).device)
        self.register_buffer("output_like", follows, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids ``[...]`` to their rows ``[..., in]``, in the model's dtype."""
        dtype = self.get_buffer("output_like").dtype
        if self.leaves_gpus and is_compiled(tokens):
            rows: Tensor = look_up(tokens.reshape(-1), self._number, self.in_features, dtype)
        else:
            rows = self.rows(tokens.reshape(-1), dtype)
        result = rows.view(*tokens.shape, self.in_features)
        return result if self.factor == 1.0 else result * result.new_full((), self.factor)

    def rows(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``[n, in]`` in ``dtype`` of token ids ``[n]``, not scaled."""
        packed = self.packed_tensors()
        if self.leaves_gpus:
            programs = backend.of(tokens) == "triton" and not backend.is_recorded()
            if programs and not is_loaded_per_call(self):
                matrix = self.matrix(tokens.device)
                if _is_looked_up(matrix):
                    return rows_of(matrix, tokens, dtype)
            packed = self._packed_on(tokens.device)
        layout = format_named(self.format_name)
        return layout.unpack(packed, self.spec, self.in_features, tokens).dequantize().to(dtype)

    def _leave_to_programs(
        self, packed: dict[str, Tensor], place: torch.device, made: bool = True
    ) -> None:
        super()._leave_to_programs(packed, place, made and _is_looked_up(self._matrix))


def _is_looked_up(matrix: Any) -> bool:
    """Whether rows of ``matrix`` can be looked up in what a GPU's programs read."""
    return isinstance(matrix, UnitMatrix) and matrix.entries is None


class TiedHead(nn.Module):
    """An output head that shares the packed table of a token embedding.

    Args:
        table: the embedding.
        bias: ``[tokens]``, or ``None``.
    """

    def __init__(self, table: QuantEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.bias = bias
        table.leaves_gpus = True
        # In a list, so that the table is registered, saved and moved once, as the embedding.
        self._table = [table]

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states ``[..., in]`` to logits ``[..., tokens]`` of the same dtype and device.

        A map of devices knows nothing of the table, and may put the head elsewhere.
        """
        table = self._table[0]
        product = table.product(x.to(table.get_buffer("output_like").device)).to(x.device)
        return product if self.bias is None else product + self.bias.to(x.dtype)

    @property
    def table(self) -> QuantEmbedding:
        """The embedding whose table is shared."""
        return self._table[0]
