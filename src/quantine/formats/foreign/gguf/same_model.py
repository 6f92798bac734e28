"""Whether a GGUF file can say all of a model's configuration, as its readers understand it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from quantine.errors import CheckpointError, FormatError, cut, shown
from quantine.formats.foreign.gguf.metadata import heads_of_keys, metadata_of
from quantine.source.gguf.config import gguf_config
from quantine.source.gguf.header import GGUFFile
from quantine.source.gguf.rope import LLAMA3, yarn_as_meant

NO_MATTER: Final = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "bos_token_id",
        "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token_id", "hidden_dropout",
        "initializer_range", "embedding_dropout", "max_window_layers", "model_type", "n_ctx",
        "pad_token_id", "pretraining_tp", "reorder_and_upcast_attn", "resid_pdrop",
        "slow_but_exact", "summary_activation",
        "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
        "task_specific_params", "tie_word_embeddings", "transformers_version", "use_cache",
        "attention_softmax_in_fp32", "max_position_embeddings",
    }
)  # fmt: skip
"""Fields of configurations that change no logits, or that files do not say and readers know."""
SCALED: Final = "llama"
"""The architecture for which llama.cpp reads a tensor of rotary factors."""
ALIKE: Final = 1e-6
"""Largest relative difference of two numbers that metadata, in float32, take for one."""


def as_read(config: Any) -> Any:
    """The configuration that readers of a GGUF file of the model understand.

    Args:
        config: of the model, whose architecture is written.

    Raises:
        FormatError: it is that of another model; the message names the first field that differs.
    """
    metadata = metadata_of(config, 0)
    try:
        # What is not asked for here are tensors: they say the vocabulary, and whether heads differ.
        found = gguf_config([GGUFFile(Path("model.gguf"), dict(metadata), ())])
    except CheckpointError as error:
        raise FormatError(f"no GGUF file says what config.json does: {cut(error, 160)}") from error
    read, wanted = _fields(found), _fields(config)
    if metadata["general.architecture"] == SCALED and _is_llama3(wanted.get("rope_parameters")):
        # A tensor says the factors.
        read["rope_parameters"] = wanted["rope_parameters"]
    for key in sorted(read.keys() | wanted.keys()):
        if not _same(read.get(key), wanted.get(key)) and not _absent(key, read, wanted):
            raise FormatError(
                f"GGUF files of this architecture do not say {key} = {shown(wanted.get(key))} "
                f"(readers take {cut(read.get(key))}): llama.cpp would run another model"
            )
    return found


def _is_llama3(rope: Any) -> bool:
    """Whether rotary embeddings are scaled as by Llama 3.1 and later, with their own constants."""
    if not isinstance(rope, dict) or rope.get("rope_type") != "llama3":
        return False
    return all(_same(rope.get(key), value) for key, value in LLAMA3.items())


def _same(one: Any, two: Any) -> bool:
    """Whether two plain values are equal, numbers as far as float32 has them."""
    if isinstance(one, dict) and isinstance(two, dict):
        return all(_same(one.get(key), two.get(key)) for key in one.keys() | two.keys())
    if isinstance(one, float) and isinstance(two, int | float):
        return math.isclose(one, two, rel_tol=ALIKE)
    return bool(one == two)


def _absent(key: str, read: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether one of two model types does not know the field, and the other leaves it off."""
    return (key not in read and not wanted[key]) or (key not in wanted and not read[key])


def _fields(config: Any) -> dict[str, Any]:
    """The fields that matter, with what is meant where they say nothing."""
    fields = {key: value for key, value in config.to_dict().items() if key not in NO_MATTER}
    if "n_inner" in fields:
        fields["n_inner"] = config.n_inner or 4 * config.n_embd
    if config.model_type == "falcon":
        fields["num_kv_heads"] = heads_of_keys(config)
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("rope_type") == "yarn":
        fields["rope_parameters"] = yarn_as_meant(rope)
    return fields
