"""Attention over keys and values that are floats, or the packed codes of a quantized KV cache.

The meaning is attention over the decoded floats. The native kernel multiplies codes directly: for
query ``q``, codes ``c``, scales ``s``, zero points ``z`` and probabilities ``p``, scores are
``(q * s_k) . c_k - q . (s_k z_k)`` and outputs ``s_v * (p . c_v - z_v * sum p)``, so that scales
and zero points are applied once for each query, not once for each token of the context.

On GPUs and in compiled graphs, attention over packed keys and values is an operator of PyTorch,
``quantine::attend_packed``, which chooses kernels when it runs.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.kv_attention import cpu
from quantine.kernels.kv_attention.packed_states import PackedStates, RecordedStates
from quantine.kernels.kv_attention.reference import attend_reference
from quantine.kernels.kv_attention.scoring import Scoring
from quantine.kernels.kv_attention.tiled import TILE, attend_in_tiles

MOST_ROWS: Final = 64
"""Largest number of queries sharing a head of keys for which the native kernel multiplies codes.
With more, PyTorch multiplies decoded floats, which takes fewer decodings."""
WIDEST: Final = 256
"""Largest number of channels of a head for which there are programs on GPUs."""
TILED: Final = 16
"""Number of query tokens from which attention is computed tile by tile. With fewer, turning keys
and values into float32 costs more than tiles save."""


def attend(
    query: Tensor,
    key: Tensor | RecordedStates,
    value: Tensor | RecordedStates,
    mask: Tensor | None,
    scoring: Scoring,
    dropout: float = 0.0,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention; arguments and results are those of `attend_reference`, but for the following.

    Without gradients and dropout, a few queries on the CPU are multiplied with the codes of packed
    keys and values, and many with floats tile by tile; on NVIDIA's GPUs all are multiplied with
    codes, see docs/gpu.md.

    Args:
        key, value: ``[batch, kv_heads, context, dim]``, floats or `PackedStates`; in a graph that
            PyTorch compiles, `RecordedStates` for both.
        keep: whether the caller reads the probabilities; ``None`` may be returned for them if not.
    """
    masks = () if mask is None else (mask,)
    reference = dropout > 0 or _learning(query, *masks)
    if isinstance(key, RecordedStates) or isinstance(value, RecordedStates):
        assert isinstance(key, RecordedStates)
        assert isinstance(value, RecordedStates)
        if not reference and key.rows.is_plain and value.rows.is_plain:
            return _operated(query, key, value, mask, scoring, keep)
        key, value = key.decoded(), value.decoded()
    if reference or _learning(key, value):
        return attend_reference(query, key, value, mask, scoring, dropout)
    if isinstance(key, PackedStates) and isinstance(value, PackedStates):
        kind = _kind(query, key, value, mask)
        if kind == "triton":
            return _operated(query, key, value, mask, scoring, keep)
        # What queries make of a centre is added as masks are, after scores are bounded.
        added = key.rows.centre is None or scoring.softcap is None
        if kind == "native" and added:
            return cpu.attend(query, key, value, mask, scoring)
    if query.device.type == "cpu" and not backend.is_recorded() and _in_tiles(query, key):
        return attend_in_tiles(query, key, value, mask, scoring, keep)
    return attend_reference(query, key, value, mask, scoring)


def _kind(
    query: Tensor, key: PackedStates, value: PackedStates, mask: Tensor | None
) -> backend.Backend:
    """Whose kernels multiply codes; the reference where floats are multiplied."""
    if backend.is_recorded():
        return "reference"
    kind = backend.of(query, mask, *key.tensors(), *value.tensors())
    if kind == "native":
        known = not key.rows.factors and value.rows.digits is None
        fits = known and _few(query, key)
    else:
        fits = key.rows.is_plain and value.rows.is_plain and _some(query, key)
    return kind if fits else "reference"


def _operated(
    query: Tensor,
    key: PackedStates | RecordedStates,
    value: PackedStates | RecordedStates,
    mask: Tensor | None,
    scoring: Scoring,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    out, probabilities = _attend(
        query.detach(),
        *(key.packed, key.bits, key.scale, key.zero),
        *(value.packed, value.bits, value.scale, value.zero),
        mask,
        *(scoring.scaling, scoring.softcap, scoring.softmax_bits, scoring.relative),
        keep,
    )
    return out, probabilities if keep else None


@torch.library.custom_op("quantine::attend_packed", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    key_bits: int,
    key_scale: Tensor,
    key_zero: Tensor,
    value: Tensor,
    value_bits: int,
    value_scale: Tensor,
    value_zero: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    softmax_bits: int,
    relative: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    keys = PackedStates(key, key_bits, key_scale, key_zero, query.dtype)
    values = PackedStates(value, value_bits, value_scale, value_zero, query.dtype)
    scoring = Scoring(scaling, softcap, softmax_bits, relative)
    if _kind(query, keys, values, mask) == "triton":
        from quantine.kernels.kv_attention.triton import attention as programs

        out, kept = programs.attend(query, keys, values, mask, scoring, keep)
    else:
        out, kept = attend(query, keys, values, mask, scoring, keep=keep)
    return out, query.new_empty(0) if kept is None or not keep else kept


@_attend.register_fake
def _shapes(
    query: Tensor,
    key: Tensor,
    key_bits: int,
    key_scale: Tensor,
    key_zero: Tensor,
    value: Tensor,
    value_bits: int,
    value_scale: Tensor,
    value_zero: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    softmax_bits: int,
    relative: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = query.shape
    kept = (batch, heads, tokens, key.shape[2]) if keep else (0,)
    return query.new_empty(batch, tokens, heads, dim), query.new_empty(kept)


def _learning(*states: Tensor) -> bool:
    """Whether PyTorch needs gradients, which only the reference has."""
    return torch.is_grad_enabled() and any(state.requires_grad for state in states)


def _in_tiles(query: Tensor, key: Tensor) -> bool:
    """Whether there are enough query tokens, and more scores than fit one tile."""
    return query.shape[2] >= TILED and query.shape[:3].numel() * key.shape[2] > TILE


def _few(query: Tensor, key: Tensor) -> bool:
    """Whether at most `MOST_ROWS` queries share a head of keys."""
    shared = query.shape[1] // key.shape[1] * query.shape[2]
    return 0 < shared <= MOST_ROWS and query.shape[0] > 0


def _some(query: Tensor, key: Tensor) -> bool:
    """Whether there are queries and tokens, of at most `WIDEST` channels, for programs on GPUs."""
    return query.numel() > 0 and key.shape[2] > 0 and query.shape[3] <= WIDEST
