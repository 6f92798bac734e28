"""What a directory of packed layers says of itself in ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from quantine.core.arithmetic import Arithmetic

FORMAT_VERSION: Final = 3
"""Version of docs/format.md that this package writes."""
METHOD: Final = "quantine"
"""``quant_method`` of quantine's own layouts."""
LOCK: Final = "weights that need quantine: pip install quantine, and import quantine before loading"
"""Stands where config.json names the weight file. Without `import quantine`, transformers would
skip the quantization and load random weights with only a warning; this makes it stop, and its
error message prints the remedy. The registered quantizer takes the lock off."""


@dataclass(frozen=True)
class Description:
    """The packed layers of a directory, for whoever writes its ``config.json``.

    Attributes:
        schemes: the distinct schemes, as plain values.
        layers: by name, for every packed matrix, ``scheme`` (index into ``schemes``) and ``shape``
            (``[out, in]``).
        arithmetic: of products with these matrices.
        activations: how they are rounded, as plain values; ``None`` where they are not.
        packed: shape of every packed tensor, by layer and by its name in the layout.
        kept_linears: names of the Linear modules that are not packed.
    """

    schemes: list[dict[str, Any]]
    layers: dict[str, dict[str, Any]]
    arithmetic: Arithmetic
    activations: dict[str, Any] | None
    packed: Mapping[str, Mapping[str, tuple[int, ...]]]
    kept_linears: Sequence[str]


def own_config(described: Description) -> dict[str, Any]:
    """Fields of ``config.json`` for layouts that only quantine reads."""
    settings = {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "schemes": described.schemes,
        "layers": described.layers,
        "arithmetic": described.arithmetic,
    }
    if described.activations is not None:
        settings["activations"] = described.activations
    return {"transformers_weights": LOCK, "quantization_config": settings}
