"""Which part of the context a mask leaves to see."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["context"])
def find_seen(
    mask,
    first,
    stop,
    heads,
    tokens,
    context,
    chunks,
    sample_stride,
    head_stride,
    token_stride,
    place_stride,
    LEAST: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What ``TOKENS`` queries see of a chunk: the first place, and that after the last.

    They are ``context`` and 0 where a query sees nothing there: its mask is ``LEAST`` or less.
    """
    chunk, line = tl.program_id(0), tl.program_id(2)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    held = (token < tokens)[:, None] & (place < context)[None, :]
    mask += (line // heads).to(tl.int64) * sample_stride + (line % heads).to(tl.int64) * head_stride
    at = token.to(tl.int64)[:, None] * token_stride + place.to(tl.int64)[None, :] * place_stride
    hidden = tl.load(mask + at, mask=held, other=0.0).to(tl.float32) <= LEAST
    visible = held & (hidden == 0)
    to = (line.to(tl.int64) * tokens + token) * chunks + chunk
    begin = tl.min(tl.where(visible, place[None, :], context), 1)
    end = tl.max(tl.where(visible, place[None, :] + 1, 0), 1)
    tl.store(first + to, begin, mask=token < tokens)
    tl.store(stop + to, end, mask=token < tokens)
