"""Bytes of a model's KV cache, computed from its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ELEMENT_BYTES: Final = 2
"""Bytes of one number in 16 bit."""


def cache_bytes(config: PretrainedConfig, tokens: int) -> int:
    """Bytes of the keys and values of ``tokens`` tokens in 16 bit.

    A key and a value for each token, block, and head that has keys of its own (RPTQ, arXiv
    2304.01089, section 3.1). Sliding windows are not taken into account: all tokens are kept.
    """
    heads = config.num_attention_heads
    keyed = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "falcon":
        first = config.multi_query and not config.new_decoder_architecture
        keyed = 1 if first else heads  # transformers repeats the shared ones in its cache
    width = head_dim(config)
    return int(2 * config.num_hidden_layers * keyed * width * tokens * ELEMENT_BYTES)


def head_dim(config: PretrainedConfig) -> int:
    """Number of channels of an attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
