"""Which instructions of a GPU a program is compiled with."""

from __future__ import annotations

from typing import Any

import triton

from quantine.kernels.matrix.units.instructions import PAIR_TIMES_PAIR_MORE, pair_codes
from quantine.kernels.matrix.units.layout import PAIRS


def settings(program: Any, **texts: tuple[str, str]) -> dict[str, str]:
    """Texts of instructions and their constraints, as a program of Triton takes them.

    Triton's interpreter knows no instructions of a GPU. There texts are empty, and the program
    computes the same by ordinary operations.

    Args:
        program: the program, which is interpreted or compiled.
        texts: by the first part of the names of its settings, text and constraints.
    """
    compiled = isinstance(program, triton.JITFunction)
    found = {}
    for name, (text, constraints) in texts.items():
        found[f"{name}_TEXT"] = text if compiled else ""
        found[f"{name}_CONSTRAINTS"] = constraints
    return found


def of_pairs(program: Any, bits: int) -> dict[str, Any]:
    """As `settings`, texts for codes of ``bits`` bits that are decoded pair by pair."""
    texts, constraints = pair_codes(bits)
    if not isinstance(program, triton.JITFunction):
        texts = ("",) * PAIRS
    decoding = {"DECODE_TEXTS": texts, "DECODE_CONSTRAINTS": constraints}
    return decoding | settings(program, MORE=PAIR_TIMES_PAIR_MORE)
