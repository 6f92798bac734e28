"""The instructions for GPUs, carried out one by one on the CPU: they decode and multiply right."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from quantine.kernels.matrix.units.activations import LARGEST
from quantine.kernels.matrix.units.instructions import (
    PAIR_TIMES_PAIR_MORE,
    pair_codes,
    pairs_product,
    unit_codes,
    unit_product,
)
from quantine.kernels.matrix.units.layout import PAIRS, pack_units
from quantine.kernels.matrix.units.statistics import FARTHEST_ZERO

TABLES = {0xEA: lambda a, b, c: (a & b) | c, 0xF8: lambda a, b, c: a | (b & c)}
"""What ``lop3`` computes, by its table."""
OF_WORDS = {
    "mov.b32": lambda a: a,
    "shr.b32": lambda a, by: a >> by,
    "shl.b32": lambda a, by: (a << by) & 0xFFFFFFFF,
    "lop3.b32": lambda a, b, c, table: TABLES[table](a, b, c),
}
OF_FLOATS = {
    "sub.rn.f16x2": lambda a, b: a - b,
    "mul.rn.f16x2": lambda a, b: a * b,
    "fma.rn.f16x2": lambda a, b, c: a * b + c,
}
"""What instructions compute; results of the second kind are rounded to float16 once."""


def halves(word: int) -> np.ndarray:
    return np.array([word], dtype=np.uint32).view(np.float16).astype(np.float64)


def word_of(values: np.ndarray) -> int:
    return int(values.astype(np.float16).view(np.uint32)[0])


def carried_out(text: str, results: int, operands: list[int]) -> dict[str, float]:
    """The registers after the instructions of ``text``, with ``operands`` behind the results."""
    held: dict[str, float] = {f"${results + i}": word for i, word in enumerate(operands)}

    def value(name: str) -> int:
        return int(held[name]) if name in held else int(name, 0)

    for line in text.split("\n"):
        if line.startswith((".reg", "{", "}")):
            continue
        if line == "mov.b32 {low, high}, sum;":
            held["low"], held["high"] = halves(int(held["sum"]))
            continue
        operation, target, *rest = re.findall(r"[^\s,;]+", line)
        if operation == "cvt.f32.f16":
            held[target] = held[rest[0]]
            continue
        found = [value(name) for name in rest]
        if "f16x2" in operation:
            held[target] = word_of(OF_FLOATS[operation](*map(halves, found)))
        else:
            held[target] = OF_WORDS[operation](*found)
    return held


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_decoded_and_multiplied(bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (1, 32), generator=generator, dtype=torch.uint8)
    words = [int(word) & 0xFFFFFFFF for word in pack_units(codes, bits)[0, :, 0]]
    centred = codes[0].double().numpy() - 2 ** (bits - 1)
    decoded = carried_out(unit_codes(bits)[0], PAIRS, words)
    for pair in range(PAIRS):
        assert halves(int(decoded[f"${pair}"])).tolist() == centred[[pair, 16 + pair]].tolist()
        alone = carried_out(pair_codes(bits)[0][pair], 1, words)["$0"]
        assert alone == decoded[f"${pair}"]
    x = torch.randn(2, PAIRS, generator=generator).half().numpy()
    pairs = [word_of(x[:, pair]) for pair in range(PAIRS)]
    found = carried_out(unit_product(bits)[0], 2, [*words, *pairs])
    for half, name in enumerate(("$0", "$1")):
        parts = centred[16 * half : 16 * half + 16] * x[half].astype(np.float64)
        assert abs(found[name] - parts.sum()) <= 2**-10 * np.abs(parts).sum()


def test_pairs_are_multiplied() -> None:
    one, other = torch.randn(2, 2, PAIRS, generator=torch.Generator().manual_seed(1)).half().numpy()
    words = [word_of(values[:, pair]) for values in (one, other) for pair in range(PAIRS)]
    found = carried_out(pairs_product()[0], 2, words)
    for half, name in enumerate(("$0", "$1")):
        parts = one[half].astype(np.float64) * other[half].astype(np.float64)
        assert abs(found[name] - parts.sum()) <= 2**-10 * np.abs(parts).sum()


def test_a_pair_is_multiplied_and_added() -> None:
    one, other, more = (word_of(np.array(pair)) for pair in ([3.0, -2.0], [0.5, 4.0], [1.0, 7.0]))
    found = carried_out(PAIR_TIMES_PAIR_MORE[0], 1, [one, other, more])
    assert halves(int(found["$0"])).tolist() == [2.5, -1.0]


def test_sums_with_the_farthest_zero_points_stay_finite() -> None:
    below = np.nextafter(np.float16(2**LARGEST), np.float16(0))
    for size in (FARTHEST_ZERO, 2 * FARTHEST_ZERO):
        words = [word_of(np.full(2, value)) for value in (size, below) for _ in range(PAIRS)]
        with np.errstate(over="ignore"):
            found = carried_out(pairs_product()[0], 2, words)
        assert (found["$0"] < np.inf) == (size == FARTHEST_ZERO)
