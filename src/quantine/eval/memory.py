"""Bytes of a model's key-value cache, from its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ELEMENT_BYTES: Final = 2
"""Of a key or value in 16 bit."""


def cache_bytes(config: PretrainedConfig, tokens: int) -> int:
    """Bytes of keys and values of ``tokens`` tokens in 16 bit, as if no layer forgets any.

    Two vectors for each layer and each head that has keys of its own (RPTQ, section 3.1).
    """
    heads = config.num_attention_heads
    keyed = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "falcon":
        first = config.multi_query and not config.new_decoder_architecture
        keyed = 1 if first else heads  # transformers repeats the shared ones in its cache
    width = head_dim(config)
    return int(2 * config.num_hidden_layers * keyed * width * tokens * ELEMENT_BYTES)


def head_dim(config: PretrainedConfig) -> int:
    """Channels of a head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
