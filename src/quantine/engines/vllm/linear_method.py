"""How vLLM's linear layers hold packed matrices and compute with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear

from quantine.activations.grids import StaticGrid, TokenGrid
from quantine.core.ambient import own_state
from quantine.core.arithmetic import Arithmetic
from quantine.core.permute import is_order
from quantine.core.spec import FLOAT16
from quantine.engines.linear import FloatPart, FusedLinear, PackedPart
from quantine.engines.split import inputs_of, outputs_of
from quantine.engines.vllm.arrivals import Arrivals
from quantine.engines.vllm.operators import linear, numbered
from quantine.engines.vllm.share import Process, Share, interleaved_order, shares
from quantine.engines.vllm.stored import FLOAT_WEIGHT, ORDER, Stored, StoredMatrix
from quantine.errors import FormatError, PlanError
from quantine.families.layers import INPUTS_NAME
from quantine.formats import format_named

INTERLEAVED: Final = ("falcon",)
"""Families whose matrix of queries, keys and values has them head by head, while vLLM's layer has
all queries first. vLLM rearranges floats as it reads them; of packed matrices outputs are."""


class PackedLinearMethod(LinearMethodBase):
    """Packed matrices of one linear layer.

    Args:
        name: the layer's name in vLLM.
        matrices: one for each of the layer's parts, or a single one that holds them all.
        stored: the directory.
        bits: to which inputs are rounded; `FLOAT16` where they are not.
    """

    def __init__(
        self, name: str, matrices: Sequence[StoredMatrix], stored: Stored, bits: int
    ) -> None:
        self._name = name
        self._matrices = matrices
        self._stored = stored
        self._bits = bits
        self._shares: list[Share] = []

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Prepare ``layer`` for its tensors; nothing is read yet.

        Raises:
            PlanError: a matrix cannot be cut for this number of processes.
        """
        heads, parts = None, list(output_partition_sizes)
        if self._interleaved(layer):
            parts = [sum(parts)]  # whole heads with their keys and values stand together
            self._check_heads(layer)
        elif isinstance(layer, QKVParallelLinear):
            heads = (layer.total_num_heads, layer.total_num_kv_heads)
        process = Process(layer.tp_rank, layer.tp_size)
        self._shares = shares(self._matrices, parts, input_size_per_partition, process, heads)
        self._check_cuts()
        layer.quantine_arrivals = Arrivals(layer, self._matrices)
        layer.quantine_dtype = params_dtype
        layer.quantine_device = torch.get_default_device()

    @own_state()
    def process_weights_after_loading(self, layer: Any) -> None:
        """Arrange what has been read for the kernels, and let go of the files.

        Raises:
            FormatError: a tensor is damaged, or has not arrived.
        """
        device = layer.quantine_device
        tensors = layer.quantine_arrivals.take(layer)
        del layer.quantine_arrivals
        order: Tensor | None = None
        parts: list[FloatPart | PackedPart] = []
        for share in self._shares:
            matrix, found = self._matrices[share.matrix], tensors[share.matrix]
            order = found.get(ORDER, order)
            grid = self._grid(matrix, found, share.inputs)
            inputs = None if grid is None else grid.to(device)
            if matrix.spec is None:
                weight = found[FLOAT_WEIGHT][slice(*share.outputs), slice(*share.inputs)]
                parts.append(FloatPart(weight.to(device, layer.quantine_dtype), inputs))
            else:
                parts.append(
                    packed_part(matrix, found, share, self._stored.arithmetic, device, inputs)
                )
        if order is not None:
            order = _checked_order(self._name, order, self._matrices[0].shape[1]).to(device)
        layer.quantine_linear = FusedLinear(parts, order, self._output_order(layer, device))
        layer.register_buffer("quantine_number", numbered(layer.quantine_linear), persistent=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map ``x`` ``[..., in]`` to ``[..., out]`` of its dtype, with ``bias`` ``[out]`` added."""
        rows = x.reshape(-1, x.shape[-1])
        found = linear(rows, layer.quantine_number, layer.quantine_linear.out_features)
        found = found if bias is None else found + bias
        return found.view(*x.shape[:-1], -1)

    def _check_heads(self, layer: Any) -> None:
        """Refuse to cut interleaved queries, keys and values inside of a head of keys.

        Raises:
            PlanError: names the matrix.
        """
        if layer.total_num_kv_heads % layer.tp_size:
            raise PlanError(
                f"{self._matrices[0].name} has queries, keys and values head by head, and cannot "
                "be cut for this tensor_parallel_size: it must divide "
                f"{layer.total_num_kv_heads}, the number of heads of keys"
            )

    def _check_cuts(self) -> None:
        """Refuse to cut inputs whose rounding depends on all of them.

        Raises:
            PlanError: names the matrix.
        """
        spec = self._stored.activations
        for share in self._shares:
            matrix = self._matrices[share.matrix]
            is_cut = share.inputs != (0, matrix.shape[1])
            by_token = spec is not None and spec.granularity == "token"
            if (
                self._bits != FLOAT16
                and is_cut
                and (by_token or f"{INPUTS_NAME}.reach" in matrix.dtypes)
            ):
                raise PlanError(
                    f"inputs of {matrix.name} are rounded by a range or factor of each token, over "
                    "all of them: serve it with tensor_parallel_size 1, or quantize with "
                    "token_factors: false and static grids"
                )

    def _grid(
        self, matrix: StoredMatrix, found: dict[str, Tensor], inputs: tuple[int, int]
    ) -> nn.Module | None:
        """What rounds the inputs of ``matrix`` that this process has."""
        if self._bits == FLOAT16:
            return None
        spec = self._stored.activations
        if spec is not None and spec.granularity == "token":
            return TokenGrid(self._bits)
        names = (*StaticGrid.tensor_names, "reach")
        scale, zero, labels, reach = (found.get(f"{INPUTS_NAME}.{name}") for name in names)
        if scale is None or zero is None or labels is None:
            raise FormatError(f"no file holds the grid of the inputs of {matrix.name}")
        StaticGrid(self._bits, scale, zero, labels, None, reach).check(
            f"{matrix.name}.{INPUTS_NAME}", matrix.shape[1]
        )
        return StaticGrid(self._bits, scale, zero, labels[slice(*inputs)], None, reach)

    def _output_order(self, layer: Any, device: torch.device) -> Tensor | None:
        if not self._interleaved(layer):
            return None
        order = interleaved_order(layer.num_heads, layer.num_kv_heads, layer.head_size)
        return order.to(device)

    def _interleaved(self, layer: Any) -> bool:
        family = self._stored.family
        fused = isinstance(layer, QKVParallelLinear) and len(self._matrices) == 1
        return fused and family is not None and family.name in INTERLEAVED


def packed_part(
    matrix: StoredMatrix,
    found: dict[str, Tensor],
    share: Share,
    arithmetic: Arithmetic,
    device: torch.device,
    inputs: nn.Module | None = None,
) -> PackedPart:
    """The part ``share`` of a packed matrix, from its tensors in the files.

    Args:
        matrix: the whole matrix.
        found: its tensors, by name; others than those of its layout are passed over.
        share: the outputs and inputs of this process.
        arithmetic: of products on the CPU.
        device: that computes.
        inputs: rounds the inputs; ``None`` where they are not rounded.

    Raises:
        FormatError: a tensor is damaged.
    """
    assert matrix.spec is not None
    layout = format_named(matrix.layout)
    tensors = {key: found[key].to(device) for key in layout.tensor_names if key in found}
    try:
        layout.check(tensors, matrix.spec, *matrix.shape)
    except FormatError as error:
        raise FormatError(f"{matrix.name} is damaged: {error}") from error
    whole = layout.unpack(tensors, matrix.spec, matrix.shape[1])
    part = inputs_of(outputs_of(whole, *share.outputs), *share.inputs)
    return PackedPart(part, arithmetic, inputs)


def _checked_order(name: str, order: Tensor, channels: int) -> Tensor:
    """A stored order of a norm's channels, for ``index_select``.

    Raises:
        FormatError: it does not name every channel once.
    """
    if order.dtype != torch.int32 or tuple(order.shape) != (channels,) or not is_order(order):
        raise FormatError(f"the order of the inputs of {name} is damaged")
    return order
