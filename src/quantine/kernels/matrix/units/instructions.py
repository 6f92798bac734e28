"""Instructions of NVIDIA's GPUs that decode a unit of codes and multiply it with activations.

Two codes are decoded and multiplied by each instruction: in a word of two float16, or-ing a code
into the mantissa of 1024 gives ``1024 + code * 2**offset`` exactly, for offsets up to
``10 - bits``. One subtraction or fused multiplication then leaves the code minus the middle of its
range.
"""

from __future__ import annotations

import functools
import struct
from typing import Final

from quantine.kernels.matrix.units.layout import HALF_BITS, PAIRS, Piece, pieces

MANTISSA: Final = 10
"""Bits of the mantissa of a float16."""
ONE: Final = 1024.0
"""The float16 whose mantissa counts ones."""
AND_OR: Final = 0xEA
"""Table of the instruction ``lop3`` for ``(a & b) | c``."""
OR_AND: Final = 0xF8
"""Table of the instruction ``lop3`` for ``a | (b & c)``."""


@functools.cache
def unit_product(bits: int) -> tuple[str, str]:
    """Instructions that multiply the codes of a unit, less the middle code, with activations.

    Operands are two results, float32: the sums over the codes of the low halves (the first 16 of
    the unit) and of the high halves; then the ``bits`` words of the unit and the `PAIRS` words of
    activations, each two float16. Sums of 16 products are made in float16.

    Args:
        bits: number of bits of one code, 2 to 8.

    Returns:
        The text of the instructions, and that of the constraints on their operands.
    """
    text = _Text(bits, results=2)
    for pair, places in enumerate(pieces(bits)):
        code = text.centered(*text.taken_out(places))
        text.multiply(pair, code, f"${2 + bits + pair}")
    text.give_sum()
    return text.finished(), _constraints(2, bits + PAIRS)


@functools.cache
def unit_codes(bits: int) -> tuple[str, str]:
    """Instructions that decode a unit: `PAIRS` words of two float16, codes less the middle.

    Operands are these words, then the ``bits`` words of the unit; results are as of `unit_product`.
    """
    text = _Text(bits, results=PAIRS)
    for pair, places in enumerate(pieces(bits)):
        code = text.centered(*text.taken_out(places))
        text.say(f"mov.b32 ${pair}, {code};")
    return text.finished(), _constraints(PAIRS, bits)


@functools.cache
def pair_codes(bits: int) -> tuple[tuple[str, ...], str]:
    """Instructions that decode one pair of a unit: a word of two codes less the middle.

    Operands are this word, then the ``bits`` words of the unit. Returns a text for each pair, and
    their constraints. Together they are as `unit_codes`, but a shift that several pairs need stands
    in each of them: the compiler makes it once.
    """
    found = []
    for places in pieces(bits):
        text = _Text(bits, results=1)
        text.say(f"mov.b32 $0, {text.centered(*text.taken_out(places))};")
        found.append(text.finished())
    return tuple(found), _constraints(1, bits)


@functools.cache
def pairs_product() -> tuple[str, str]:
    """Instructions that multiply `PAIRS` words with `PAIRS` words; results as `unit_product`'s."""
    text = _Text(0, results=2)
    for pair in range(PAIRS):
        text.multiply(pair, f"${2 + pair}", f"${2 + PAIRS + pair}")
    text.give_sum()
    return text.finished(), _constraints(2, 2 * PAIRS)


PAIR_TIMES_PAIR: Final = ("mul.rn.f16x2 $0, $1, $2;", "=r,r,r")
"""The instruction that multiplies two words of two float16, and its constraints."""
PAIR_TIMES_PAIR_MORE: Final = ("fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r")
"""The same with a word of two sums that the products are added to."""


def _constraints(results: int, operands: int) -> str:
    return ",".join([*["=r"] * results, *["r"] * operands])


class _Text:
    """The instructions written so far.

    Attributes:
        lines: instructions.
        shifted: names of words after a shift, by word and number of bits.
        constants: names of registers by the word that they hold.
    """

    def __init__(self, bits: int, results: int) -> None:
        self.bits = bits
        self.results = results
        self.lines: list[str] = []
        self.shifted: dict[tuple[int, int], str] = {}
        self.constants: dict[str, str] = {}

    def taken_out(self, places: list[Piece]) -> tuple[str, int]:
        """The name of a word of two floats ``1024 + code * 2**offset``, and that offset."""
        if len(places) == 1 and places[0].width == self.bits:
            place = places[0]
            by = self._shift(place.offset)
            offset = place.offset - by
            word = self._word(place.word, by)
            mask = _twice(((1 << self.bits) - 1) << offset)
            self.say(f"lop3.b32 code, {word}, {mask}, {_twice(_half(ONE))}, {AND_OR};")
            return "code", offset
        offset = self._best_offset(places)
        joined = _twice(_half(ONE))
        for place in places:
            word = self._word(place.word, place.offset - place.first - offset)
            mask = _twice(((1 << place.width) - 1) << (place.first + offset))
            if joined == "code":
                self.say(f"lop3.b32 code, code, {word}, {mask}, {OR_AND};")
            else:
                self.say(f"lop3.b32 code, {word}, {mask}, {joined}, {AND_OR};")
            joined = "code"
        return joined, offset

    def _best_offset(self, places: list[Piece]) -> int:
        """Where a code of several pieces is put together so that fewest words must be shifted."""

        def shifts(offset: int) -> int:
            keys = {(place.word, place.offset - place.first - offset) for place in places}
            return sum(by != 0 and (word, by) not in self.shifted for word, by in keys)

        return min(range(MANTISSA - self.bits + 1), key=shifts)

    def centered(self, code: str, offset: int) -> str:
        """The name of a word of two codes less the middle code, from `taken_out`'s results."""
        middle = float(2 ** (self.bits - 1))
        if offset == 0:
            self.say(f"sub.rn.f16x2 {code}, {code}, {self._constant(ONE + middle)};")
        else:
            factor = self._constant(2.0**-offset)
            off = self._constant(-(ONE * 2.0**-offset) - middle)
            self.say(f"fma.rn.f16x2 {code}, {code}, {factor}, {off};")
        return code

    def multiply(self, pair: int, word: str, x: str) -> None:
        """Add the products of two words to the sum; the first pair begins it."""
        if pair == 0:
            self.say(f"mul.rn.f16x2 sum, {word}, {x};")
        else:
            self.say(f"fma.rn.f16x2 sum, {word}, {x}, sum;")

    def give_sum(self) -> None:
        """Write both halves of the sum to the first two results, as float32."""
        self.say("mov.b32 {low, high}, sum;")
        self.say("cvt.f32.f16 $0, low;")
        self.say("cvt.f32.f16 $1, high;")

    def say(self, line: str) -> None:
        """Add an instruction."""
        self.lines.append(line)

    def finished(self) -> str:
        """The whole text."""
        names = ["code", "sum", *self.shifted.values(), *self.constants.values()]
        held = [f"mov.b32 {name}, {word};" for word, name in self.constants.items()]
        return "\n".join(
            [
                "{",
                f".reg .b32 {', '.join(names)};",
                ".reg .f16 low, high;",
                *held,
                *self.lines,
                "}",
            ]
        )

    def _shift(self, offset: int) -> int:
        """How far a word is shifted down so that the code at ``offset`` fits the mantissa.

        All codes of a word that need it share one shift.
        """
        starts = range(0, HALF_BITS, self.bits)
        far = [start for start in starts if start + self.bits > MANTISSA]
        return far[0] if offset + self.bits > MANTISSA else 0

    def _word(self, word: int, by: int) -> str:
        source = f"${self.results + word}"
        if by == 0:
            return source
        key = (word, by)
        if key not in self.shifted:
            self.shifted[key] = f"word{word}{'down' if by > 0 else 'up'}{abs(by)}"
            way = "shr.b32" if by > 0 else "shl.b32"
            self.say(f"{way} {self.shifted[key]}, {source}, {abs(by)};")
        return self.shifted[key]

    def _constant(self, value: float) -> str:
        """The name of a register that holds ``value`` twice: arithmetic takes no literals."""
        word = _twice(_half(value))
        return self.constants.setdefault(word, f"constant{len(self.constants)}")


def _half(value: float) -> int:
    """The bits of a float16, which must represent ``value`` exactly."""
    packed = struct.pack("<e", value)
    assert struct.unpack("<e", packed)[0] == value
    return int.from_bytes(packed, "little")


def _twice(half: int) -> str:
    """A word that has ``half`` in both of its halves."""
    return f"0x{half << HALF_BITS | half:08x}"
