"""Attention over packed keys and values on a GPU beside PyTorch's over float16."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from allowance import Allowance
from gpu_graphs import Gpu, copies, replayed, speeds
from quantine.kernels.bits.reference import packed_bytes
from quantine.kernels.kv_attention import attend
from quantine.kernels.kv_attention.packed_states import PackedStates
from quantine.kernels.kv_attention.scoring import Scoring
from roofline import COPIES, DIM, KV_HEADS

CONTEXTS = (4096, 32768)
"""Tokens that one query of attention meets, of the heads that benchmarks/roofline.py names."""
BITS = (4, 8, 3)
"""Bits of keys and values."""


def timed_attentions(
    gpu: Gpu,
    allowance: Allowance,
    contexts: Sequence[int] = CONTEXTS,
    bits: Sequence[int] = BITS,
) -> list[dict[str, Any]]:
    """A row for each context and width of keys and values."""
    rows: list[dict[str, Any]] = []
    for context in contexts:
        slow = float16(gpu, context)
        for width in bits:
            name = f"{width} bits, {context} tokens"
            rows += allowance.rows(name, partial(timed_attention, gpu, context, width, slow))
    return rows


def float16(gpu: Gpu, context: int) -> float:
    """Microseconds of one query over float16, by PyTorch."""
    shape = (2, 1, KV_HEADS, context, DIM)
    floats = copies(torch.randn(shape, dtype=torch.float16, device=gpu.device))
    query = query_of(gpu)
    return replayed(
        gpu,
        [partial(scaled_dot_product_attention, query, *both, enable_gqa=True) for both in floats],
    )


def timed_attention(gpu: Gpu, context: int, bits: int, slow: float) -> list[dict[str, Any]]:
    """The row of one query over packed keys and values, beside ``slow`` microseconds of float16."""
    query = query_of(gpu)
    grid = torch.rand(KV_HEADS, DIM, device=gpu.device) + 0.5
    shape = (2, 1, KV_HEADS, context, packed_bytes(DIM, bits))
    codes = copies(torch.randint(256, shape, dtype=torch.uint8, device=gpu.device))
    states = [[PackedStates(each, bits, grid, grid, query.dtype) for each in two] for two in codes]
    scoring = Scoring(DIM**-0.5)
    calls = [partial(attend, query, *two, None, scoring, keep=False) for two in states]
    row: dict[str, Any] = {"context": context, "bits": bits}
    row |= speeds(gpu, replayed(gpu, calls), slow, codes[0].nbytes)
    print(row, flush=True)
    return [row]


def query_of(gpu: Gpu) -> torch.Tensor:
    """One query of every head."""
    return torch.randn(1, KV_HEADS * COPIES, 1, DIM, dtype=torch.float16, device=gpu.device)
