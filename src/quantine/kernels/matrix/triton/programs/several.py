"""Pairs of codes times several rows of activations: each is decoded once for all of them.

A pair is multiplied with those of all rows of activations, which are read just then, before the
next one is decoded. So registers hold sums, and neither activations nor decoded codes. Sums are of
16 products, in float16, as of `quantine.kernels.matrix.triton.programs.parts.codes_times`.

Two numbers of each unit are a tuple here: of a word of two float16, which one instruction computes
with; or, in Triton's interpreter, where ``TEXT`` is empty, of two float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.matrix.triton.programs.parts import (
    code_of,
    high_half,
    low_half,
    take_pair,
)


@triton.jit
def of_words(word, TEXT: tl.constexpr):
    """The two numbers of words of two float16."""
    if TEXT != "":
        numbers = (word,)
    else:
        numbers = (low_half(word).to(tl.float32), high_half(word).to(tl.float32))
    return numbers


@triton.jit
def no_sums(like, TEXT: tl.constexpr):
    """Two zeros for each of ``like``."""
    return of_words(tl.zeros(like.shape, tl.int32), TEXT)


@triton.jit
def decode_pair(
    words,
    pair: tl.constexpr,
    BITS: tl.constexpr,
    DECODE_TEXTS: tl.constexpr,
    DECODE_CONSTRAINTS: tl.constexpr,
):
    """Two codes of each unit, less the middle code."""
    if DECODE_TEXTS[pair] != "":
        code = tl.inline_asm_elementwise(
            DECODE_TEXTS[pair], DECODE_CONSTRAINTS, words, dtype=tl.int32, is_pure=True, pack=1
        )
        numbers = (code,)
    else:
        middle: tl.constexpr = 2 ** (BITS - 1)
        low, high = code_of(words, pair, 0, BITS) - middle, code_of(words, pair, 1, BITS) - middle
        numbers = (low.to(tl.float32), high.to(tl.float32))
    return numbers


@triton.jit
def pair_times(one, other, sums, TEXT: tl.constexpr, CONSTRAINTS: tl.constexpr):
    """``sums`` and the products of ``one`` and ``other``."""
    if TEXT != "":
        found = tl.inline_asm_elementwise(
            TEXT, CONSTRAINTS, one + other + sums, dtype=tl.int32, is_pure=True, pack=1
        )
        numbers = (found,)
    else:
        numbers = (one[0] * other[0] + sums[0], one[1] * other[1] + sums[1])
    return numbers


@triton.jit
def as_floats(numbers, TEXT: tl.constexpr):
    """Both numbers, float32."""
    if TEXT != "":
        numbers = (low_half(numbers[0]).to(tl.float32), high_half(numbers[0]).to(tl.float32))
    return numbers


@triton.jit
def codes_times_several(
    words,
    x,
    unit,
    STEP: tl.constexpr,
    UNITS: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    BITS: tl.constexpr,
    DECODE_TEXTS: tl.constexpr,
    DECODE_CONSTRAINTS: tl.constexpr,
    MORE_TEXT: tl.constexpr,
    MORE_CONSTRAINTS: tl.constexpr,
):
    """As `codes_times`, for each row of ``x`` sums of low and of high halves."""
    sums = ()
    for m in tl.static_range(BATCH):
        sums = sums + (no_sums(words[0], MORE_TEXT),)
    for pair in tl.static_range(16):
        code = decode_pair(words, pair, BITS, DECODE_TEXTS, DECODE_CONSTRAINTS)
        more = ()
        for m in tl.static_range(BATCH):
            met = take_pair(x + m * STEP, pair, unit, UNITS, ROWS, WHOLE)
            met = of_words(met, MORE_TEXT)
            more = more + (pair_times(code, met, sums[m], MORE_TEXT, MORE_CONSTRAINTS),)
        sums = more
    found = ()
    for m in tl.static_range(BATCH):
        found = found + (as_floats(sums[m], MORE_TEXT),)
    return found
