"""Whether a GGUF file describes the model that it was written from, as its readers see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from quantine.errors import FormatError, cut, shown
from quantine.formats.foreign.gguf.blocks import KNOWN
from quantine.source.gguf.config import gguf_config
from quantine.source.gguf.parts import read_parts
from quantine.source.gguf.weights import check_gguf_weights
from quantine.source.model_source import ModelSource

NO_MATTER: Final = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "bos_token_id",
        "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token_id", "hidden_dropout",
        "initializer_range", "embedding_dropout", "max_window_layers", "model_type", "n_ctx",
        "pad_token_id", "pretraining_tp", "reorder_and_upcast_attn", "resid_pdrop",
        "scale_attn_by_inverse_layer_idx", "slow_but_exact", "summary_activation",
        "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
        "task_specific_params", "tie_word_embeddings", "transformers_version", "use_cache",
        "attention_softmax_in_fp32", "max_position_embeddings",
    }
)  # fmt: skip
"""Fields of configurations that change no logits, or that files do not say and readers know."""


def check_same_model(file: Path, config: Any) -> None:
    """Refuse a file from which another model would be read, in names, shapes or how it computes.

    Args:
        file: that has been written.
        config: of the model.

    Raises:
        FormatError: names the first field that a GGUF file does not tell.
    """
    parts = read_parts(file, KNOWN)
    found = gguf_config(parts)
    read, wanted = _fields(found), _fields(config)
    for key in sorted(read.keys() | wanted.keys()):
        if read.get(key) != wanted.get(key) and not _absent(key, read, wanted):
            raise FormatError(
                f"GGUF files of this architecture do not say {key} = {shown(wanted.get(key))} "
                f"(readers take {cut(read.get(key))}): llama.cpp would run another model"
            )
    check_gguf_weights(parts, ModelSource(str(file), file.parent).bare_model(found))


def _absent(key: str, read: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether one of two model types does not know the field, and the other leaves it off."""
    return (key not in read and not wanted[key]) or (key not in wanted and not read[key])


def _fields(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in NO_MATTER}
