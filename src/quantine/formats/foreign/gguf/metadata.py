"""The metadata of a GGUF file: what `quantine.source.gguf.config` reads, written."""

from __future__ import annotations

from typing import Any, Final

from quantine.errors import FormatError
from quantine.formats.foreign.gguf.file import Value
from quantine.source.gguf.config import ARCHITECTURES, QUANTIZATION_VERSION, Architecture
from quantine.source.gguf.rope import yarn_as_meant, yarn_attention

ALIKE: Final = {"mistral": "llama"}
"""Model types that llama.cpp takes for another, by that one's name."""
UNSAID: Final = {
    "bloom": {"context_length": 2048},
    "falcon": {},
}
"""Counts that the configuration of an architecture lacks, by llama.cpp's names."""


def architecture_of(config: Any) -> str | None:
    """What llama.cpp calls the architecture; ``None`` if it is not written."""
    kind = ALIKE.get(config.model_type, config.model_type)
    return next((name for name, one in ARCHITECTURES.items() if one.model_type == kind), None)


def metadata_of(config: Any, file_type: int) -> dict[str, Value]:
    """All that is said of the model but its tokenizer and its name.

    Args:
        config: of the model, whose architecture is one of `ARCHITECTURES`.
        file_type: of the file, see `BlockType.file_type`.
    """
    architecture = architecture_of(config)
    assert architecture is not None
    own = _own(config, architecture, ARCHITECTURES[architecture])
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.file_type": file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
        **{f"{architecture}.{key}": value for key, value in own.items()},
    }


def _own(config: Any, architecture: str, known: Architecture) -> dict[str, Value]:
    values: dict[str, Value] = {}
    width = config.hidden_size
    for key, field in known.counts.items():
        found = None if field is None else getattr(config, field, None)
        if found is None:
            found = UNSAID.get(architecture, {}).get(key) or 4 * width  # the width of an MLP
        values[key] = int(found)
    heads = int(config.num_attention_heads)
    values[known.epsilon[0]] = float(getattr(config, known.epsilon[1]))
    values["attention.head_count_kv"] = heads_of_keys(config)
    values["vocab_size"] = int(config.vocab_size)
    head = int(getattr(config, "head_dim", None) or width // heads)
    if known.head_dim:
        values |= {"attention.key_length": head, "attention.value_length": head}
    for key, field in known.optional.items():
        found = getattr(config, field, None)
        if found is not None:
            values[key] = found
    if known.rotary:
        values |= _rope(config, known, head)
    return values


def heads_of_keys(config: Any) -> int:
    """Number of heads of keys and values."""
    heads = int(config.num_attention_heads)
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else heads
    names = ("num_kv_heads", "num_key_value_heads")
    return int(next((n for name in names if (n := getattr(config, name, None))), heads))


def _rope(config: Any, known: Architecture, head: int) -> dict[str, Value]:
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    values: dict[str, Value] = {}
    if known.local:
        values["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    values["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1.0))
    values["rope.freq_base"] = float(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "yarn":
        values |= _yarn(config, rope)
    elif kind not in {"default", "llama3"}:
        raise FormatError(f"rotary embeddings scaled by {kind!r} are not written to GGUF files")
    return values


def _yarn(config: Any, rope: dict[str, Any]) -> dict[str, Value]:
    factor, meant = float(rope["factor"]), yarn_as_meant(rope)
    usual = yarn_attention(factor)
    attention = float(meant.get("attention_factor", usual))
    context = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(context),
        "rope.scaling.attn_factor": attention / usual,
        "rope.scaling.yarn_beta_fast": float(meant["beta_fast"]),
        "rope.scaling.yarn_beta_slow": float(meant["beta_slow"]),
    }
