"""Attention over packed keys and values on a GPU beside PyTorch's over float16."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from gpu_graphs import copies, replayed
from quantine.kernels.bits.reference import packed_bytes
from quantine.kernels.kv_attention import attend
from quantine.kernels.kv_attention.packed_states import PackedStates
from quantine.kernels.kv_attention.scoring import Scoring
from roofline import COPIES, DIM, KV_HEADS

CONTEXTS = (4096, 32768)
"""Tokens that one query of attention meets, of the heads that benchmarks/roofline.py names."""


def timed_attentions() -> list[dict[str, Any]]:
    """A row for each context."""
    return [timed_attention(context) for context in CONTEXTS]


def timed_attention(context: int) -> dict[str, Any]:
    """Microseconds of one query over 4-bit keys and values, beside PyTorch's over float16."""
    query = torch.randn(1, KV_HEADS * COPIES, 1, DIM, dtype=torch.float16, device="cuda")
    shape = (2, 1, KV_HEADS, context, DIM)
    floats = copies(lambda: torch.randn(shape, dtype=torch.float16, device="cuda"))
    slow = replayed(
        [partial(scaled_dot_product_attention, query, *both, enable_gqa=True) for both in floats]
    )
    del floats
    grid = torch.rand(KV_HEADS, DIM, device="cuda") + 0.5
    shape = (*shape[:4], packed_bytes(DIM, 4))
    codes = copies(lambda: torch.randint(256, shape, dtype=torch.uint8, device="cuda"))
    moved = codes[0].nbytes
    states = [[PackedStates(each, 4, grid, grid, query.dtype) for each in both] for both in codes]
    scoring = Scoring(DIM**-0.5)
    spent = replayed([partial(attend, query, *both, None, scoring, keep=False) for both in states])
    row = {
        "context": context,
        "microseconds": round(spent, 2),
        "float16_microseconds": round(slow, 2),
        "times_float16": round(slow / spent, 2),
        "gigabytes_per_second": round(moved / spent / 1e3, 1),
    }
    print(row, flush=True)
    return row
