"""Attention of a few rows of queries over a part of the packed context."""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.kv_attention.triton.programs.codes import paired, take_codes, unpaired
from quantine.kernels.kv_attention.triton.programs.outputs import outputs_of
from quantine.kernels.programs.whole_numbers import to_whole


@triton.jit
def _prepared(query, held, channel, scale, zero, scaling, BITS: tl.constexpr, DIM: tl.constexpr):
    """Queries as codes of keys meet them, and what their products with codes lack.

    Scores are ``factor * (halves . (code - middle)) + offset``: queries times the scales of keys,
    over a power of two for each row, fit into float16.
    """
    real = channel < DIM
    q = tl.load(query, mask=held[:, None] & real[None, :], other=0.0).to(tl.float32) * scaling
    q *= tl.load(scale + channel, mask=real, other=0.0)[None, :]
    less = tl.load(zero + channel, mask=real, other=0.0) - 2 ** (BITS - 1)
    offset = -tl.sum(q * less[None, :], 1)
    # The largest becomes less than 2**15. A float32's exponent counts from 127.
    exponent = (tl.max(tl.abs(q), 1).to(tl.int32, bitcast=True) >> 23) - 14
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    factor = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return paired((q * inverse[:, None]).to(tl.float16), BITS), factor, offset


@triton.jit
def _range(first, stop, line, held, context, chunks, CHUNKS: tl.constexpr):
    """The part of the context that any row sees; all of it where a row sees nothing.

    Probabilities of such a row are whatever softmax makes of them, which depends on all tokens.
    """
    chunk = tl.arange(0, CHUNKS)
    there = held[:, None] & (chunk < chunks)[None, :]
    at = line[:, None] + chunk[None, :]
    begin = tl.min(tl.load(first + at, mask=there, other=context), 1)
    end = tl.max(tl.load(stop + at, mask=there, other=0), 1)
    blind = tl.max(tl.where(held & (end == 0), 1, 0), 0) == 1
    return tl.where(blind, 0, tl.min(begin, 0)), tl.where(blind, context, tl.max(end, 0))


@triton.jit
def _bounded(scores, softcap):
    """``softcap * tanh(scores / softcap)``."""
    return softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))


@triton.jit(do_not_specialize=["context"])
def attend_part(
    query,
    key,
    key_scale,
    key_zero,
    value,
    value_scale,
    value_zero,
    mask,
    first,
    stop,
    largest,
    total,
    scores,
    mixed,
    tops,
    sums,
    out,
    heads,
    tokens,
    context,
    chunks,
    query_sample_stride,
    query_head_stride,
    query_token_stride,
    query_channel_stride,
    key_sample_stride,
    key_head_stride,
    value_sample_stride,
    value_head_stride,
    mask_sample_stride,
    mask_head_stride,
    mask_token_stride,
    mask_place_stride,
    seen_sample_stride,
    seen_head_stride,
    seen_token_stride,
    scaling,
    softcap,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOP: tl.constexpr,
    RELATIVE: tl.constexpr,
):
    """See `quantine.kernels.kv_attention.triton.attention`, which launches it."""
    tiles = tl.cdiv(tokens * COPIES, ROWS)
    # Tiles of late tokens see most, and begin first.
    tile, kv_head = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    part, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    held = row < tokens * COPIES
    token = tl.minimum(row // COPIES, tokens - 1).to(tl.int64)
    head = (kv_head * COPIES + row % COPIES).to(tl.int64)
    flat = (sample * heads + head) * tokens + token

    channel = tl.arange(0, WIDTH)
    line = sample * query_sample_stride + head * query_head_stride + token * query_token_stride
    halves, factor, offset = _prepared(
        query + line[:, None] + channel[None, :] * query_channel_stride,
        held,
        channel,
        key_scale + kv_head * DIM,
        key_zero + kv_head * DIM,
        scaling,
        KEY_BITS,
        DIM,
    )
    begin, end = 0, context
    if first is not None:
        line = sample * seen_sample_stride + head * seen_head_stride + token * seen_token_stride
        begin, end = _range(first, stop, line, held, context, chunks, CHUNKS)
    begin = begin // TOKENS * TOKENS  # so that many tokens can be read at once
    length = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(1)), TOKENS) * TOKENS
    begin += part * length
    end = tl.minimum(begin + length, end)

    key += sample * key_sample_stride + kv_head.to(tl.int64) * key_head_stride
    value += sample * value_sample_stride + kv_head.to(tl.int64) * value_head_stride
    key_bytes: tl.constexpr = (DIM * KEY_BITS + 7) // 8
    value_bytes: tl.constexpr = (DIM * VALUE_BITS + 7) // 8
    mask_line = sample * mask_sample_stride + head * mask_head_stride + token * mask_token_stride
    top = tl.full([ROWS, 1], float("-inf"), tl.float32)
    if largest is not None:
        top = tl.load(largest + flat, mask=held, other=0.0)[:, None]
        whole = tl.load(total + flat, mask=held, other=1.0)[:, None]
    weight = tl.zeros([ROWS, 1], tl.float32)
    sum_of_codes = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(begin, end, TOKENS):
        place = start + tl.arange(0, TOKENS)
        inside = place < end
        there = held[:, None] & inside[None, :]
        codes = take_codes(key, place, inside, KEY_BITS, key_bytes, WIDTH)
        score = tl.dot(halves, tl.trans(codes)) * factor[:, None] + offset[:, None]
        if softcap is not None:
            score = _bounded(score, softcap)
        if mask is not None:
            at = mask + mask_line[:, None] + place[None, :] * mask_place_stride
            score += tl.load(at, mask=there, other=0.0).to(tl.float32)
        score = tl.where(inside[None, :], score, float("-inf"))
        if scores is not None:
            tl.store(scores + flat[:, None] * context + place[None, :], score, mask=there)
        if largest is not None:
            share = tl.exp(score - top)
            if not RELATIVE:
                share = share / whole
            share = to_whole(share * TOP)
        else:
            higher = tl.maximum(top, tl.max(score, 1, keep_dims=True))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            share = tl.exp(score - base)
            fade = tl.exp(top - base)
            weight *= fade
            sum_of_codes *= fade
            top = higher
        weight += tl.sum(share, 1, keep_dims=True)
        if mixed is not None or out is not None:
            codes = take_codes(value, place, inside, VALUE_BITS, value_bytes, WIDTH)
            sum_of_codes = tl.dot(share.to(tl.float16), codes, sum_of_codes)

    if mixed is not None or out is not None:
        sum_of_codes = unpaired(sum_of_codes, VALUE_BITS)
    if out is not None:
        found = outputs_of(
            sum_of_codes,
            weight,
            value_scale + kv_head * DIM + channel[None, :],
            value_zero + kv_head * DIM + channel[None, :],
            (channel < DIM)[None, :],
            VALUE_BITS,
            0 if RELATIVE else TOP,
        )
        at = ((sample * tokens + token) * heads + head)[:, None] * DIM + channel[None, :]
        there = held[:, None] & (channel < DIM)[None, :]
        tl.store(out + at, found.to(out.dtype.element_ty), mask=there)
    else:
        flat = flat[:, None] * tl.num_programs(1) + part
        tl.store(tops + flat, top, mask=held[:, None])
        tl.store(sums + flat, weight, mask=held[:, None])
        if mixed is not None:
            tl.store(mixed + flat * WIDTH + channel[None, :], sum_of_codes, mask=held[:, None])
