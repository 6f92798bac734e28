"""The configuration of a GGUF file's model: all that its metadata say of how it computes.

Each architecture has its list of what is understood. Other metadata of the architecture are refused
by name, since whoever leaves them out gets another model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from quantine.errors import CheckpointError, FamilyError, cut, shown
from quantine.source.gguf.header import GGUFFile, GGUFTensor, Length
from quantine.source.gguf.metadata import Metadata
from quantine.source.gguf.rope import FREQUENCIES, frequency_factors, scaled_rope
from quantine.source.settings import MOST_BLOCKS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TABLE: Final = "token_embd.weight"
"""Name of the token table."""
HEAD: Final = "output.weight"
"""Name of the output head; a model whose head is the token table has none."""
DECODER: Final = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
"""Fields of ``config.json`` by what llama.cpp calls them, in most architectures."""
GEMMA: Final = {
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Further fields of the Gemma models."""
RMS: Final = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
"""What llama.cpp and transformers call the epsilon of norms, in most architectures."""
LAYER_NORM: Final = ("attention.layer_norm_epsilon", "layer_norm_epsilon")
"""What they call it in architectures with layer norms."""
NEUTRAL: Final = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "tensor_data_layout": ("Meta AI original pth", "jploski"),
}
"""Values that say what holds without them, too, by their name."""
TOKENS: Final = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
"""What llama.cpp calls the ids of special tokens, by field of ``config.json``."""
FURTHER_ENDS: Final = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
"""What it calls tokens that end an answer, too: a turn, and a message."""
QUANTIZATION_VERSION: Final = 2
"""Of the layout of all types' blocks."""
THETA: Final = 10000.0
"""Base of rotary embeddings where metadata do not say it."""


@dataclass(frozen=True)
class Architecture:
    """What is understood of the metadata of one architecture.

    Attributes:
        model_type: what transformers calls it.
        counts: fields of ``config.json`` by metadata that must be there; ``None`` stands for what
            has no field, because the shapes of tensors say it.
        epsilon: what llama.cpp and transformers call the epsilon of norms.
        optional: fields by metadata, where transformers has the same defaults as llama.cpp.
        groups: field for the number of heads of keys; ``None`` where there is none.
        head_dim: whether there is a field ``head_dim``.
        partial: whether only some channels of a head may be rotated.
        rotary: whether positions are rotary embeddings.
        local: whether blocks with a sliding window have rotary embeddings of their own.
        scaled_blocks: number of blocks of the one model whose attention scores are scaled by its
            width over the number of heads, and not by the width of a head; ``None`` where
            ``config.json`` has no such scale.
    """

    model_type: str
    counts: Mapping[str, str | None] = field(default_factory=lambda: DECODER)
    epsilon: tuple[str, str] = RMS
    optional: Mapping[str, str] = field(default_factory=dict)
    groups: str | None = "num_key_value_heads"
    head_dim: bool = False
    partial: bool = False
    rotary: bool = True
    local: bool = False
    scaled_blocks: int | None = None


ARCHITECTURES: Final = {
    "llama": Architecture("llama", head_dim=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", head_dim=True),
    "gemma2": Architecture("gemma2", optional=GEMMA, head_dim=True, scaled_blocks=46),
    "gemma3": Architecture(
        "gemma3_text", optional=GEMMA, head_dim=True, local=True, scaled_blocks=62
    ),
    "phi3": Architecture(
        "phi3",
        partial=True,
        optional={
            "attention.sliding_window": "sliding_window",
            "rope.scaling.original_context_length": "original_max_position_embeddings",
        },
    ),
    "falcon": Architecture(
        "falcon",
        {**DECODER, "feed_forward_length": "ffn_hidden_size"},
        LAYER_NORM,
        groups="num_kv_heads",
    ),
    "bloom": Architecture(
        "bloom",
        {
            "block_count": "n_layer",
            "context_length": None,
            "embedding_length": "hidden_size",
            "feed_forward_length": None,
            "attention.head_count": "n_head",
        },
        LAYER_NORM,
        groups=None,
        rotary=False,
    ),
    "gpt2": Architecture(
        "gpt2",
        {
            "block_count": "n_layer",
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
        },
        LAYER_NORM,
        groups=None,
        rotary=False,
    ),
}
"""What is understood of GGUF files, by what they call their architecture."""


def gguf_config(parts: Sequence[GGUFFile]) -> PretrainedConfig:
    """The configuration of the model in GGUF files.

    Args:
        parts: the result of `quantine.source.gguf.parts.read_parts`.

    Raises:
        FamilyError: nothing is known of the architecture.
        CheckpointError: metadata are missing, contradict each other, or are not understood.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path, said = parts[0].path, parts[0].metadata
    name, kind = said.get("general.architecture"), said.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(
            f"{path} is a GGUF file of type {shown(kind)}: give the model's own file"
        )
    blocks = said.get("general.quantization_version", QUANTIZATION_VERSION)
    if blocks != QUANTIZATION_VERSION:
        raise CheckpointError(
            f"{path} has blocks of version {shown(blocks)}, and only those of version "
            f"{QUANTIZATION_VERSION} are read: make it again with a newer llama.cpp"
        )
    if name not in ARCHITECTURES:
        raise FamilyError(
            f"{path}: GGUF files of architecture {shown(name)} are not read, only those of "
            f"{', '.join(ARCHITECTURES)}: quantize the model that it was made from"
        )
    own = {k.removeprefix(f"{name}."): v for k, v in said.items() if k.startswith(f"{name}.")}
    metadata = Metadata(path, own)
    tensors = {tensor.name: tensor for part in parts for tensor in part.tensors}
    fields = _fields(metadata, ARCHITECTURES[name], tensors)
    fields["vocab_size"] = metadata.count("vocab_size", _vocabulary(said, tensors))
    unknown = {k: v for k, v in metadata.rest.items() if v not in NEUTRAL.get(k, ())}
    if unknown:
        listed = ", ".join(
            f"{name}.{cut(key, 40)} = {cut(unknown[key], 20)}" for key in [*unknown][:3]
        )
        raise CheckpointError(
            f"{path} has {len(unknown)} metadata that are not understood ({listed}): quantize the "
            "model that it was made from"
        )
    fields |= {key: _token(parts[0], stored, fields) for key, stored in TOKENS.items()}
    ends = [fields["eos_token_id"], *(_token(parts[0], key, fields) for key in FURTHER_ENDS)]
    different = [token for token in dict.fromkeys(ends) if token is not None]
    if different:
        fields["eos_token_id"] = different if len(different) > 1 else different[0]
    fields["tie_word_embeddings"] = HEAD not in tensors or _are_equal(
        tensors[HEAD], tensors.get(TABLE)
    )
    try:
        config: PretrainedConfig = AutoConfig.for_model(ARCHITECTURES[name].model_type, **fields)
    except (ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
        raise CheckpointError(
            f"{path} has metadata that contradict each other: {cut(error)}"
        ) from error
    return config


def _fields(
    metadata: Metadata, known: Architecture, tensors: Mapping[str, GGUFTensor]
) -> dict[str, Any]:
    """Take the shape of the model, and how it computes, out of ``metadata``."""
    counts = {key: metadata.count(key) for key in known.counts}
    if counts["block_count"] > MOST_BLOCKS:
        raise CheckpointError(
            f"{metadata.path} is damaged: no model has {counts['block_count']} blocks"
        )
    fields: dict[str, Any] = {f: counts[key] for key, f in known.counts.items() if f is not None}
    fields[known.epsilon[1]] = metadata.number(known.epsilon[0])
    heads, width = counts["attention.head_count"], counts["embedding_length"]
    groups = metadata.count("attention.head_count_kv", heads)
    if known.groups is not None:
        fields[known.groups] = groups
    elif groups != heads:
        raise CheckpointError(f"{metadata.path} has {heads} heads, but {groups} of keys and values")
    rotated = metadata.count("rope.dimension_count", width // heads or 1)
    head = metadata.count("attention.key_length", rotated if known.head_dim else width // heads)
    lengths = {head, metadata.count("attention.value_length", head)}
    lengths |= set() if known.partial else {rotated}
    lengths |= set() if known.head_dim else {width // heads}
    if len(lengths) > 1:
        raise CheckpointError(
            f"{metadata.path} has heads of {width // heads} channels with keys, values and rotary "
            f"embeddings of other widths ({', '.join(map(str, sorted(lengths)))}): that is not "
            "understood"
        )
    if known.head_dim:
        fields["head_dim"] = head
    if known.scaled_blocks is not None:
        large = counts["block_count"] == known.scaled_blocks
        fields["query_pre_attn_scalar"] = width // heads if large else head
    if FREQUENCIES in tensors and math.prod(tensors[FREQUENCIES].shape) != rotated // 2:
        raise CheckpointError(
            f"{FREQUENCIES} in {metadata.path} has shape {tensors[FREQUENCIES].shape}, but "
            f"{rotated} channels of a head are rotated"
        )
    if known.rotary:
        fields["rope_parameters"] = _rope(metadata, known, tensors, counts["context_length"])
        if rotated != head:
            fields["rope_parameters"]["partial_rotary_factor"] = rotated / head
    for key, name in known.optional.items():
        # Where some blocks always have a window, its size is no 0, which elsewhere is none.
        windowed = known.scaled_blocks is not None and name == "sliding_window"
        neutral = () if windowed else NEUTRAL.get(key, ())
        given = key in metadata.rest and metadata.rest[key] not in neutral
        if given or (windowed and known.local):
            fields[name] = metadata.number(key)
    return fields


def _rope(
    metadata: Metadata, known: Architecture, tensors: Mapping[str, GGUFTensor], context: int
) -> dict[str, Any]:
    """Take ``rope_parameters`` out of ``metadata``, or out of a tensor."""
    theta = float(metadata.number("rope.freq_base", THETA))
    rope = scaled_rope(metadata, context)
    if FREQUENCIES in tensors:
        if rope["rope_type"] != "default":
            raise CheckpointError(f"{metadata.path} scales rotary embeddings in two ways")
        rope = frequency_factors(tensors[FREQUENCIES], theta)
    rope["rope_theta"] = theta
    if not known.local:
        return rope
    local = float(metadata.number("rope.freq_base_swa", THETA))
    return {
        "full_attention": rope,
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


def _vocabulary(said: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]) -> int | None:
    """Number of tokens: the rows of the token table, else the length of the list of tokens."""
    if TABLE in tensors:
        return tensors[TABLE].shape[0]
    tokens = said.get("tokenizer.ggml.tokens")
    return tokens.items if isinstance(tokens, Length) else None


def _token(file: GGUFFile, key: str, fields: Mapping[str, Any]) -> int | None:
    """The id of a special token; ``None`` where there is none.

    Files whose tokenizer has no such token name one that is not there, as llama.cpp lets them.
    """
    value = file.metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int):
        raise CheckpointError(f"{file.path} has {key} = {cut(value, 20)}, which is no token")
    return value if 0 <= value < fields["vocab_size"] else None


def _are_equal(head: GGUFTensor, table: GGUFTensor | None) -> bool:
    """Whether the output head is the token table once more, as some writers store it."""
    if table is None or (head.type, head.shape) != (table.type, table.shape):
        return False
    return head.read() == table.read()
