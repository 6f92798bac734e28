"""Directories of small random models, of the architectures that transformers has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from quantine.families.derivation.small import own_generators, randomize, small_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BLOCKS: Final = 3
"""Most blocks of a small model."""
UNSTATED: Final[dict[str, dict[str, Any]]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 64,
        "num_experts_per_tok": 2,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
    },
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 8},
    "qwen2_moe": {"sliding_window": None},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", *["hybrid"] * 2]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", *["hybrid"] * 2]},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32]},
}
"""Fields, by model type, without which the default configuration describes no causal model, or not
what makes the type's own: blocks that share their attention."""
TEXT: Final = "To be, or not to be, that is the question. "
"""What small models are calibrated on, many times over."""


def specimen_config(model_type: str) -> PretrainedConfig:
    """The default configuration of a model type in transformers, with its sizes cut down."""
    from transformers import AutoConfig

    return small_config(AutoConfig.for_model(model_type, **UNSTATED.get(model_type, {})), BLOCKS)


def write_specimen(config: PretrainedConfig, directory: Path) -> None:
    """Save a random causal language model of ``config`` in float32, and a tokenizer of bytes.

    Weights are rounded to bfloat16 numbers of moderate size, which any 16 bit keep without loss.
    """
    from transformers import AutoModelForCausalLM

    with own_generators(), torch.no_grad():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomize(model)
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


def byte_tokenizer() -> Any:
    """A tokenizer with one token for each byte."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
