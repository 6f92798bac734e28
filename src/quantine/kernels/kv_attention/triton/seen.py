"""Which part of the context a mask leaves to see, found on a GPU."""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.kv_attention.triton.programs.seen import find_seen

CHUNK: Final = 1024
"""Tokens of the context in which one program looks."""
QUERIES: Final = 4
"""Queries for which it does."""


def look(mask: Tensor, context: int) -> Tensor:
    """The first place that each query sees in each chunk of the context, and that after the last.

    Args:
        mask: ``[batch, heads, tokens, context]``, any of which may be 1 to be broadcast. The lowest
            number of its dtype, and what is below it, hides a token.
        context: number of tokens of keys.

    Returns:
        ``[2, batch, heads, tokens, chunks]`` int32, with the mask's shape; ``context`` and 0 where
        a query sees nothing in a chunk.
    """
    batch, heads, tokens, _ = mask.shape
    chunks = triton.cdiv(context, CHUNK)
    ends = mask.new_empty(2, batch, heads, tokens, chunks, dtype=torch.int32)
    program, operands, settings = launch_of(mask, context, ends)
    with backend.launching(mask):
        grid = (chunks, triton.cdiv(tokens, QUERIES), batch * heads)
        program[grid](*operands, **settings)
    return ends


def launch_of(mask: Tensor, context: int, ends: Tensor) -> tuple[Any, list[Any], dict[str, Any]]:
    """The program, its operands in order, and what is fixed when it is compiled.

    Args:
        mask, context: as of `look`.
        ends: what it fills.
    """
    heads, tokens = mask.shape[1:3]
    operands = [
        mask,
        *ends,
        *(heads, tokens, context, ends.shape[4]),
        *mask.expand(-1, -1, -1, context).stride(),
    ]
    settings = {
        "LEAST": torch.finfo(mask.dtype).min if mask.is_floating_point() else float("-inf"),
        "TOKENS": min(QUERIES, triton.next_power_of_2(tokens)),
        "CHUNK": CHUNK,
        "num_warps": 4,
    }
    return find_seen, operands, settings
