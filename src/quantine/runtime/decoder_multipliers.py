"""Factors of Granite's models on embeddings, on what blocks add, and on logits.

The native decoder has none of them, and needs none. Its residual stream is that of the model
divided by the factor on what blocks add, so that blocks add what they compute. Norms undo that, if
what they add to a mean square is divided by the square of the factor. Logits are divided before the
head, in the weights of the last norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from quantine.runtime.decoder_checks import refuse

MULTIPLIES: Final = frozenset({"granite"})
"""Model types with such factors."""


@dataclass(frozen=True)
class Multipliers:
    """The factors of one model.

    Attributes:
        embedding: on rows of the token embedding.
        residual: on what attention and MLPs add to the residual stream.
        logits: what logits are divided by.
    """

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0


def multipliers_of(model: Any) -> Multipliers:
    """The factors of ``model``; all are 1 in models without.

    Raises:
        BackendUnavailable: blocks differ in theirs, or they or logits are multiplied by 0.
    """
    config = model.config
    if config.model_type not in MULTIPLIES:
        return Multipliers()
    residual = {float(layer.residual_multiplier) for layer in model.model.layers}
    if len(residual) != 1 or not min(residual) > 0 or not config.logits_scaling:
        refuse(
            f"blocks are multiplied by {sorted(residual)[:4]}, logits by {config.logits_scaling}"
        )
    return Multipliers(
        float(model.model.embedding_multiplier), residual.pop(), float(config.logits_scaling)
    )
