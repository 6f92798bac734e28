"""The tokenizer of a GGUF file: what transformers makes of it, put right by what the file says."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Final

from quantine.errors import CheckpointError, cut
from quantine.source.gguf.header import GGUFFile, Length
from quantine.source.gguf.splits import split_as_named

UNSAID: Final = (None, "default")
"""Values of ``tokenizer.ggml.pre`` of files that do not say how text is split."""


def as_file_says(tokenizer: Any, file: GGUFFile) -> Any:
    """A tokenizer that has the file's tokens alone, and splits text as the file says.

    Args:
        tokenizer: what transformers made of the file; it may be changed.
        file: the header.

    Raises:
        CheckpointError: the file names a way to split text that is not known.
    """
    name = file.metadata.get("tokenizer.ggml.pre")
    says = file.metadata.get("tokenizer.ggml.model") == "gpt2" and name not in UNSAID
    if says and not split_as_named(tokenizer.backend_tokenizer, str(name)):
        raise CheckpointError(
            f"{file.path}: its tokenizer splits text as {cut(name)} does (tokenizer.ggml.pre), "
            "which is not known here: give the model's directory with its tokenizer.json"
        )
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    return _without_others(tokenizer, tokens.items) if isinstance(tokens, Length) else tokenizer


def _without_others(tokenizer: Any, count: int) -> Any:
    """The same without tokens from number ``count`` on, for which a model has no row.

    transformers adds special tokens of the class that it takes, where the file has none like them.
    """
    from transformers import PreTrainedTokenizerFast

    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    others = {token.content for number, token in added.items() if number >= count}
    if not others:
        return tokenizer
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save_pretrained(name)
        path = Path(name) / "tokenizer.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        found["added_tokens"] = [one for one in found["added_tokens"] if one["id"] < count]
        path.write_text(json.dumps(found), encoding="utf-8")
        path = Path(name) / "tokenizer_config.json"
        said = json.loads(path.read_text(encoding="utf-8"))
        said = {k: v for k, v in said.items() if not (isinstance(v, str) and v in others)}
        path.write_text(json.dumps(said), encoding="utf-8")
        return PreTrainedTokenizerFast.from_pretrained(name)
