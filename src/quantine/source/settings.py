"""Fields of config.json that transformers takes as they are, and that fail where a model runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeGuard

import torch

from quantine.errors import CheckpointError, shown

MOST_BLOCKS: Final = 2000
"""Most decoder blocks of a model; with many more it would take minutes only to say that weights are
missing."""
SPANS: Final = {
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
"""Fields that count the tokens which attention looks back, by the type of layers that need them."""
FIXED: Final = {"return_dict": True, "is_encoder_decoder": False}
"""Fields without which models return tuples, or wait for the output of an encoder."""
FLAGS: Final = ("output_attentions", "output_hidden_states", "use_cache")
"""Fields that are true or false."""
UNLIMITED: Final = "_limit"
"""Last part of the names of fields that may be infinite: bounds that bound nothing."""
TOKENS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields that name tokens: a number, a list of them, or nothing."""


def check_blocks(name: str, fields: Mapping[str, Any]) -> None:
    """Refuse so many blocks that transformers would take long to make a configuration of them.

    Args:
        name: of the model.
        fields: the content of its ``config.json``.

    Raises:
        CheckpointError: names the field and its value.
    """
    for key in ("num_hidden_layers", "n_layer"):
        blocks = fields.get(key)
        if isinstance(blocks, int | float) and blocks > MOST_BLOCKS:
            raise CheckpointError(f"{name}: config.json is damaged: no model has {key} {blocks}")


def check_settings(config: Any) -> None:
    """Refuse values with which a model of ``config`` would fail, or never end, only when it runs.

    Args:
        config: a model's configuration in transformers.

    Raises:
        CheckpointError: names the field and its value.
    """
    blocks = getattr(config, "num_hidden_layers", 0)
    if not (_is_whole(blocks) and 0 <= blocks <= MOST_BLOCKS):
        _refuse("num_hidden_layers", blocks, f"a whole number up to {MOST_BLOCKS}")
    kinds = getattr(config, "layer_types", None) or []
    for kind, name in SPANS.items():
        span = getattr(config, name, None)
        unused = span == 0 and kinds and kind not in kinds  # as transformers marks it
        if span is not None and not unused and not (_is_whole(span) and span > 0):
            _refuse(name, span, "a positive whole number, or null")
        if span is None and kind in kinds:
            _refuse(name, span, f"a positive whole number, as some layers are of type {kind}")
    for name, needed in FIXED.items():
        if getattr(config, name, needed) is not needed:
            _refuse(name, getattr(config, name), str(needed).lower())
    if not isinstance(getattr(config, "dtype", None), torch.dtype | None):
        _refuse("dtype", config.dtype, "the name of one of PyTorch's dtypes")
    check_generation(config)
    for path, number in _floats(config.to_dict(), ""):
        if not math.isfinite(number) and not (number > 0 and path.endswith(UNLIMITED)):
            _refuse(path, number, "a finite number")


def attention_of(config: Any) -> str | None:
    """The attention function that a model of ``config`` needs; ``None`` leaves it to transformers.

    Scores with a bound (Gemma 2) need ``eager``: transformers 5.19 chooses ``sdpa``, which knows
    nothing of it.
    """
    return "eager" if getattr(config, "attn_logit_softcapping", None) is not None else None


def check_generation(config: Any) -> None:
    """Refuse flags that are none, and special tokens that are no token ids.

    Args:
        config: a model's configuration, or its settings for generation, which have the same fields.

    Raises:
        CheckpointError: names the field and its value.
    """
    for name in FLAGS:
        flag = getattr(config, name, None)
        if not isinstance(flag, bool | None):
            _refuse(name, flag, "true or false")
    for name in TOKENS:
        value: object = getattr(config, name, None)
        ids = value if isinstance(value, list) else [value]
        if value is not None and not all(_is_whole(one) and abs(one) < 2**63 for one in ids):
            _refuse(name, value, "a token id, a list of them, or null")


def _refuse(name: str, value: object, needed: str) -> None:
    raise CheckpointError(f"{name} is {shown(value)} in the configuration, but must be {needed}")


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _floats(value: object, path: str) -> Iterator[tuple[str, float]]:
    """Every float inside of ``value``, with the path of its field."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _floats(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _floats(part, path)
    elif isinstance(value, float):
        yield path, value
