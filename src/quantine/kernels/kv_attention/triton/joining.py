"""The parts of the context of attention on a GPU, joined in their order."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.kv_attention.triton.programs.outputs import join_parts
from quantine.kernels.kv_attention.triton.request import Parts, Request


def join(request: Request, parts: Parts, out: Tensor) -> None:
    """Fill ``out`` ``[batch, tokens, heads, dim]`` with what programs found in ``parts``."""
    batch, heads, tokens, _ = request.query.shape
    program, operands, settings = launch_of(request, parts, out)
    with backend.launching(out):
        program[(tokens, heads, batch)](*operands, **settings)


def launch_of(request: Request, parts: Parts, out: Tensor) -> tuple[Any, list[Any], dict[str, Any]]:
    """The program, its operands in order, and what is fixed when it is compiled."""
    _, heads, tokens, dim = request.query.shape
    value = request.value
    operands = [
        *(parts.mixed, parts.tops, parts.sums),
        *(value.scale, value.zero),
        out,
        *(heads, tokens, request.parts),
    ]
    settings = {
        "BITS": value.bits,
        "DIM": dim,
        "WIDTH": request.width,
        "COPIES": request.copies,
        "PARTS": triton.next_power_of_2(request.parts),
        "TOP": 0 if request.scoring.relative else request.top,
        "num_warps": 4,
    }
    return join_parts, operands, settings
