"""How products of queries and keys become attention probabilities."""

from __future__ import annotations

from dataclasses import dataclass

from quantine.core.activation_spec import UNQUANTIZED


@dataclass(frozen=True)
class Scoring:
    """How products of queries and keys become attention probabilities.

    Attributes:
        scaling: factor on every product, usually ``dim ** -0.5``.
        softcap: bound ``c`` of scores, as ``c * tanh(score / c)``; ``None`` for no bound.
        softmax_bits: bits that probabilities are rounded to; 16 leaves them as they are.
        relative: whether the ratio of each probability to the largest of its row is rounded,
            instead of the probability; see
            `quantine.kernels.kv_attention.reference.round_probabilities`.
    """

    scaling: float
    softcap: float | None = None
    softmax_bits: int = UNQUANTIZED
    relative: bool = True
