"""Which tokens a layer sees."""

from __future__ import annotations

from typing import Any, Final

from quantine.runtime.decoder_checks import refuse
from quantine.runtime.decoder_structure import Structure

LAYER_TYPES: Final = frozenset({"full_attention", "sliding_attention"})
"""Types of attention in ``config.layer_types`` that the native decoder has."""


def mask_of(config: Any, structure: Structure, index: int) -> tuple[str, int | None]:
    """The type of the attention of layer number ``index``, and its window if it has one.

    Raises:
        BackendUnavailable: it is of another type, or its mask and its cache would differ.
    """
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if getattr(config, "attention_chunk_size", None) is not None:
        refuse("attention is in chunks")
    if structure.masks == "types":
        kind = "full_attention" if types is None else types[index]
    else:
        slides = structure.masks == "window" and window is not None
        kind = "sliding_attention" if slides else "full_attention"
        # The cache goes by these fields, too.
        if any(other != kind for other in types or ()) or (window is not None and not slides):
            model_type = config.model_type
            refuse(f"masks and cache of a {model_type} with these layer types would differ")
    if kind not in LAYER_TYPES:
        refuse(f"layer {index} is of type {kind!r}")
    if kind == "full_attention":
        return kind, None
    if window is None or window < 1:
        refuse(f"layer {index} has a window of {window}")
    return kind, window
