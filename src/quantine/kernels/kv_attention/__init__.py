"""Attention over packed keys and values, and over floats.

The meaning is attention over the decoded floats. The native kernel multiplies codes: scores are
``(q * s_k) . c_k - q . (s_k z_k)`` and outputs ``s_v * (p . c_v - z_v * sum p)``, so that scales
and zero points are met once for each query.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.kv_attention import cpu
from quantine.kernels.kv_attention.packed_states import PackedStates
from quantine.kernels.kv_attention.reference import attend_reference
from quantine.kernels.kv_attention.scoring import Scoring
from quantine.kernels.kv_attention.tiled import TILE, attend_in_tiles

MOST_ROWS: Final = 64
"""Queries sharing a head of keys up to which codes are multiplied as they are. For more, PyTorch
multiplies decoded floats."""
TILED: Final = 16
"""Tokens from which many scores are made tile by tile: fewer do not make up for keys and values
turned into float32."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
    dropout: float = 0.0,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention of ``query`` ``[batch, heads, tokens, dim]``; see `attend_reference`.

    Where keys and values are `PackedStates` of the CPU, a few queries meet their codes.

    Args:
        keep: whether probabilities are wanted; there may be ``None`` otherwise.
    """
    learning = _learning(query, key, value, *(() if mask is None else (mask,)))
    if dropout > 0 or learning or query.device.type != "cpu":
        return attend_reference(query, key, value, mask, scoring, dropout)
    if (
        isinstance(key, PackedStates)
        and isinstance(value, PackedStates)
        and _few(query, key)
        and backend.of(query, key.packed, value.packed) == "native"
    ):
        return cpu.attend(query, key, value, mask, scoring)
    if _in_tiles(query, key):
        return attend_in_tiles(query, key, value, mask, scoring, keep)
    return attend_reference(query, key, value, mask, scoring)


def _learning(*states: Tensor) -> bool:
    """Whether a gradient is wanted, or a graph: only the reference has one."""
    wanted = torch.is_grad_enabled() and any(state.requires_grad for state in states)
    return wanted or backend.is_recorded()


def _in_tiles(query: Tensor, key: Tensor) -> bool:
    """Whether there are more scores than one tile has."""
    return query.shape[2] >= TILED and query.shape[:3].numel() * key.shape[2] > TILE


def _few(query: Tensor, key: Tensor) -> bool:
    """Whether so few queries share a head of keys that its codes are better not decoded."""
    shared = query.shape[1] // key.shape[1] * query.shape[2]
    return 0 < shared <= MOST_ROWS and query.shape[0] > 0
