"""How scores of attention become probabilities."""

from __future__ import annotations

from dataclasses import dataclass

from quantine.core.activation_spec import UNQUANTIZED


@dataclass(frozen=True)
class Scoring:
    """From products of queries and keys to probabilities.

    Attributes:
        scaling: factor on every product.
        softcap: scores are bounded by it, smoothly; ``None`` for no bound.
        softmax_bits: probabilities are rounded to these; 16 for none.
        relative: what is rounded is the ratio of each to the largest of its row; see
            `quantine.kernels.kv_attention.reference.round_probabilities`.
    """

    scaling: float
    softcap: float | None = None
    softmax_bits: int = UNQUANTIZED
    relative: bool = True
