"""How vLLM's token embeddings and output heads hold packed matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from quantine.core.ambient import own_state
from quantine.core.arithmetic import Arithmetic
from quantine.engines.linear import FusedLinear
from quantine.engines.vllm import operators
from quantine.engines.vllm.arrivals import Arrivals
from quantine.engines.vllm.linear_method import packed_part
from quantine.engines.vllm.share import Share, check_share
from quantine.engines.vllm.stored import StoredMatrix
from quantine.errors import PlanError
from quantine.formats import format_named
from quantine.runtime.modules import QuantEmbedding


class PackedHeadMethod(QuantizeMethodBase):
    """A packed output head, cut among processes by tokens.

    Args:
        matrix: the head.
        arithmetic: of products on the CPU.
    """

    def __init__(self, matrix: StoredMatrix, arithmetic: Arithmetic) -> None:
        self._matrix = matrix
        self._arithmetic = arithmetic

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
            PlanError: the matrix cannot be cut for this number of processes.
        """
        check_share(self._matrix, self._share(layer))
        layer.quantine_arrivals = Arrivals(layer, [self._matrix])
        layer.quantine_dtype = params_dtype
        layer.quantine_device = torch.get_default_device()

    @own_state()
    def process_weights_after_loading(self, layer: Any) -> None:
        """Arrange what has been read for the kernels, and let go of the files.

        Raises:
            FormatError: a tensor is damaged, or has not arrived.
        """
        [tensors] = layer.quantine_arrivals.take(layer)
        del layer.quantine_arrivals
        self._arrange(layer, tensors)

    def _arrange(self, layer: Any, tensors: dict[str, Tensor]) -> None:
        part = packed_part(
            self._matrix, tensors, self._share(layer), self._arithmetic, layer.quantine_device
        )
        layer.quantine_linear = FusedLinear([part])
        number = operators.numbered(layer.quantine_linear)
        layer.register_buffer("quantine_number", number, persistent=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits ``[rows, tokens]`` of hidden states ``x`` ``[rows, in]``.

        vLLM's number of tokens is a multiple of 64; those that are none get 0.
        """
        count = layer.quantine_linear.out_features
        found = operators.linear(x, layer.quantine_number, count)
        found = pad(found, (0, layer.num_embeddings_per_partition - count))
        return found if bias is None else found + bias

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Nothing is tied: the head is a matrix of its own."""
        return layer

    def _share(self, layer: Any) -> Share:
        indices = layer.shard_indices
        outputs = (indices.org_vocab_start_index, indices.org_vocab_end_index)
        return Share(0, outputs, (0, self._matrix.shape[1]))


class PackedEmbeddingMethod(PackedHeadMethod):
    """A packed token embedding, which may be the head, too.

    Rows that are looked up are decoded; so every process has the whole table, and the part of it
    with which it would multiply.
    """

    def _arrange(self, layer: Any, tensors: dict[str, Tensor]) -> None:
        matrix, device = self._matrix, layer.quantine_device
        super()._arrange(layer, tensors)
        assert matrix.spec is not None
        names = format_named(matrix.layout).tensor_names
        packed = {key: tensors[key].to(device) for key in names if key in tensors}
        table = QuantEmbedding(
            matrix.layout, matrix.spec, *matrix.shape, packed, dtype=layer.quantine_dtype
        )
        layer.quantine_table = _Table(table, self._share(layer).outputs[0])
        number = operators.numbered(layer.quantine_table)
        layer.register_buffer("quantine_table_number", number, persistent=False)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """The rows ``[..., width]`` of tokens ``[...]``, counted from the first of this process."""
        number, dtype = layer.quantine_table_number, layer.quantine_dtype
        return operators.embedding(input_, number, self._matrix.shape[1], dtype)


class TiedHeadMethod(QuantizeMethodBase):
    """The head of a model whose packed token embedding is its head, too."""

    def create_weights(self, layer: Any, *_: Any, **__: Any) -> None:
        """Nothing: `tie_weights` says where the weights are."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Use the embedding's matrix.

        Raises:
            PlanError: vLLM's model holds the embedding in floats only.
        """
        method = getattr(embed_tokens, "quant_method", None)
        if not isinstance(method, PackedEmbeddingMethod):
            raise PlanError(
                "this model of vLLM holds its token embedding in floats only: keep it in floats, "
                "by a rule with keep, and quantize again"
            )
        layer.quantine_tied = [embed_tokens]  # in a list, so that it is no child
        return layer

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits ``[rows, tokens]`` of hidden states ``x`` ``[rows, in]``."""
        [table] = layer.quantine_tied
        found: Tensor = table.quant_method.apply(table, x, bias)
        return found


class _Table:
    """Looks up rows of ``table`` by tokens that are counted from ``first``."""

    def __init__(self, table: QuantEmbedding, first: int) -> None:
        self._table = table
        self._first = first

    def __call__(self, tokens: Tensor) -> Tensor:
        found: Tensor = self._table(tokens + self._first if self._first else tokens)
        return found
