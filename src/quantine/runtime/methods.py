"""Methods of a quantized model that take the place of those of transformers.

They are attributes of the model itself. Partial functions, unlike bound methods that its class does
not have, can be pickled, and a copy of the model has them bound to the copy.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantine.activations.attention import NAME as ATTENTION
from quantine.errors import FormatError, cut
from quantine.formats.description import LOCK
from quantine.formats.shards import write_atomically
from quantine.runtime.hf_generate import Generate
from quantine.runtime.modules import TiedHead
from quantine.runtime.packed import Packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def replace_methods(model: PreTrainedModel) -> None:
    """Replace the methods of a quantized model that would ignore packed weights or spoil them."""
    changed: Any = model
    changed.save_pretrained = partial(_save_locked, model)
    changed.resize_token_embeddings = partial(_resize, model)
    changed.tie_weights = partial(_tie, model)
    changed.set_attn_implementation = partial(_set_attention, model)
    if hasattr(model, "generate"):  # not so a bare model without its head
        changed.generate = Generate(model)


def _save_locked(model: PreTrainedModel, save_directory: str | Path, **options: Any) -> None:
    """Writes `LOCK` into the copy as well, which transformers drops when it saves the config."""
    type(model).save_pretrained(model, save_directory, **options)
    path = Path(save_directory) / "config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8")) | {"transformers_weights": LOCK}
        write_atomically(path, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def _resize(
    model: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    **options: Any,
) -> Any:
    """Refuses before anything has changed where the embedding or the head is packed."""
    table, head = _tables(model)
    if not isinstance(table, Packed) and not isinstance(head, Packed):
        ordinary = type(model).resize_token_embeddings
        return ordinary(model, new_num_tokens, pad_to_multiple_of, **options)
    if new_num_tokens is None and pad_to_multiple_of is None:
        return table
    raise FormatError(
        "the token embedding or the head is packed and cannot be resized: resize the float model "
        "and quantize it again, or quantize without --head-bits"
    )


def _tie(model: PreTrainedModel, *args: Any, **options: Any) -> None:
    """Packed tables are tied when they are loaded: see `TiedHead`."""
    table, head = _tables(model)
    if isinstance(head, TiedHead) and head.table is not table:
        raise FormatError(
            "the head shares the packed table of an embedding that was replaced: give the model a "
            "head, too, with set_output_embeddings, and set config.tie_word_embeddings to False"
        )
    if not isinstance(head, Packed | TiedHead) and not isinstance(table, Packed):
        type(model).tie_weights(model, *args, **options)


def _set_attention(model: PreTrainedModel, attn_implementation: Any, **options: Any) -> None:
    """Refuses an attention function that would leave queries, keys and values as they are."""
    rounds = model.config._attn_implementation == ATTENTION
    if rounds and attn_implementation != ATTENTION:
        raise FormatError(
            f"this model rounds what attention reads, which only {ATTENTION!r} does, and not "
            f"{cut(attn_implementation, 40)}: quantize with a scheme such as W4A16 for another one"
        )
    type(model).set_attn_implementation(model, attn_implementation, **options)


def _tables(model: PreTrainedModel) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()
