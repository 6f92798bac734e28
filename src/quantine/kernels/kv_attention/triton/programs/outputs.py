"""From sums of codes to outputs of attention."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def outputs_of(mixed, weight, scale, zero, real, BITS: tl.constexpr, TOP: tl.constexpr):
    """Outputs of sums of codes, less the middle code, that were weighted.

    ``weight`` is the sum of the weights, ``TOP`` what weights are multiples of where they are not
    to sum to one, else 0. ``scale`` and ``zero`` point to the grids of the channels.
    """
    if TOP != 0:
        mixed, share = mixed / TOP, weight / TOP
    else:
        mixed, share = mixed / weight, 1.0
    less = tl.load(zero, mask=real, other=0.0) - 2 ** (BITS - 1)
    return tl.load(scale, mask=real, other=0.0) * (mixed - less * share)


@triton.jit
def join_parts(
    mixed,
    tops,
    sums,
    scale,
    zero,
    out,
    heads,
    tokens,
    parts,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    COPIES: tl.constexpr,
    PARTS: tl.constexpr,
    TOP: tl.constexpr,
):
    """The output of one query, from what `attend_part` found in all parts of the context."""
    token, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    number = tl.arange(0, PARTS)
    there = number < parts
    at = ((sample * heads + head) * tokens + token) * parts + number
    top = tl.load(tops + at, mask=there, other=float("-inf"))
    highest = tl.max(top, 0)
    share = tl.exp(top - tl.where(highest == float("-inf"), 0.0, highest))
    weight = tl.sum(tl.load(sums + at, mask=there, other=0.0) * share, 0)
    channel = tl.arange(0, WIDTH)
    codes = tl.load(mixed + at[:, None] * WIDTH + channel[None, :], mask=there[:, None], other=0.0)
    total = tl.sum(codes * share[:, None], 0)
    own = head // COPIES * DIM + channel
    found = outputs_of(total, weight, scale + own, zero + own, channel < DIM, BITS, TOP)
    to = ((sample * tokens + token) * heads + head) * DIM + channel
    tl.store(out + to, found.to(out.dtype.element_ty), mask=channel < DIM)
