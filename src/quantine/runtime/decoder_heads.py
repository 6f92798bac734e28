"""How many heads attention has, and where a fused matrix has what belongs to them.

Each function reads the attributes that the model's own ``forward`` reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantine.families.layers import is_transposed
from quantine.runtime.decoder_checks import refuse
from quantine.runtime.packed import Packed


class Slice(NamedTuple):
    """Outputs of a fused matrix that belong together.

    Attributes:
        offset: the first of them.
        length: how many follow each other.
        stride: from the first of one run to the first of the next.
        runs: number of runs.
    """

    offset: int
    length: int
    stride: int
    runs: int

    def indices(self) -> Tensor:
        """``[length * runs]`` int64: the outputs, in their order."""
        starts = self.offset + self.stride * torch.arange(self.runs, device="cpu")
        return (starts[:, None] + torch.arange(self.length, device="cpu")).flatten()


def outputs_of(module: Any) -> int:
    """Number of outputs of a module with a matrix, be it packed or not.

    Raises:
        BackendUnavailable: it has none.
    """
    if isinstance(module, Packed):
        return module.out_features
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        refuse(f"a matrix is in a {type(module).__name__}")
    return weight.shape[1 if is_transposed(module) else 0]


def halves(outputs: int) -> tuple[Slice, Slice]:
    """The first and the second half of a matrix with an even number of ``outputs``.

    Raises:
        BackendUnavailable: the number is odd.
    """
    if outputs % 2:
        refuse(f"a fused matrix of {outputs} outputs has no halves")
    half = outputs // 2
    return Slice(0, half, half, 1), Slice(half, half, half, 1)


@dataclass(frozen=True)
class Heads:
    """Heads of an attention module.

    Attributes:
        heads: number of heads of queries.
        kv_heads: number of heads of keys and of values.
        dim: width of a head.
        grouped: where one matrix makes queries, keys and values, whether each head of keys and of
            values stands behind the queries that meet it; else all keys stand behind all queries.
    """

    heads: int
    kv_heads: int
    dim: int
    grouped: bool = False

    def slices(self, outputs: int) -> tuple[Slice, Slice, Slice]:
        """Queries, keys and values in the outputs of one matrix.

        Args:
            outputs: number of outputs of the matrix.

        Raises:
            BackendUnavailable: the matrix has more or fewer outputs than these heads.
        """
        q, kv = self.heads * self.dim, self.kv_heads * self.dim
        if outputs != q + 2 * kv or self.heads % self.kv_heads:
            refuse(
                f"a fused matrix of {outputs} outputs does not have {self.heads} and "
                f"{self.kv_heads} heads of {self.dim}"
            )
        if not self.grouped:
            return Slice(0, q, q, 1), Slice(q, kv, kv, 1), Slice(q + kv, kv, kv, 1)
        shared, runs = q // self.kv_heads, self.kv_heads
        stride = shared + 2 * self.dim
        return (
            Slice(0, shared, stride, runs),
            Slice(shared, self.dim, stride, runs),
            Slice(shared + self.dim, self.dim, stride, runs),
        )


def separate(attention: Any) -> Heads:
    """Heads where queries, keys and values have matrices of their own.

    Raises:
        BackendUnavailable: attributes disagree with the matrices.
    """
    dim = attention.head_dim
    heads, kv_heads = (
        outputs_of(projection) // dim for projection in (attention.q_proj, attention.k_proj)
    )
    _check_groups(attention, heads, kv_heads)
    if getattr(attention, "num_heads", heads) != heads:
        refuse("attention modules do not have as many heads as their matrices say")
    return Heads(heads, kv_heads, dim)


def of_phi3(attention: Any) -> Heads:
    """Heads of Phi 3: all queries, all keys, all values.

    Raises:
        BackendUnavailable: attributes disagree with each other.
    """
    heads, kv_heads = attention.config.num_attention_heads, attention.num_key_value_heads
    _check_groups(attention, heads, kv_heads)
    return Heads(heads, kv_heads, attention.head_dim)


def of_gpt2(attention: Any) -> Heads:
    """Heads of GPT-2: all queries, all keys, all values, as many of each."""
    heads = attention.split_size // attention.head_dim
    return Heads(heads, heads, attention.head_dim)


def of_gpt_neox(attention: Any) -> Heads:
    """Heads of GPT-NeoX: query, key and value of one head follow each other."""
    heads = outputs_of(attention.query_key_value) // (3 * attention.head_size)
    return Heads(heads, heads, attention.head_size, grouped=True)


def of_bloom(attention: Any) -> Heads:
    """Heads of Bloom, in the order of GPT-NeoX."""
    return Heads(attention.num_heads, attention.num_heads, attention.head_dim, grouped=True)


def of_falcon(attention: Any) -> Heads:
    """Heads of Falcon: each head of keys and of values behind its queries.

    Older models have one head of keys for all queries (``multi_query``), or one for each.

    Raises:
        BackendUnavailable: attributes disagree with each other.
    """
    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    if not attention.new_decoder_architecture:
        expected = 1 if attention.multi_query else heads
        if kv_heads != expected:
            refuse(f"attention has {kv_heads} heads of keys, not {expected}")
    return Heads(heads, kv_heads, attention.head_dim, grouped=True)


def _check_groups(attention: Any, heads: int, kv_heads: int) -> None:
    if getattr(attention, "num_key_value_groups", heads // kv_heads) != heads // kv_heads:
        refuse("attention modules do not share keys among heads as their matrices say")
