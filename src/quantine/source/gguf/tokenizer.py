"""The tokenizer of a GGUF file: what transformers makes of it, put right by what the file says."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Final

from quantine.errors import CheckpointError, cut
from quantine.source.gguf.header import GGUFFile, Length
from quantine.source.gguf.spaces import put_spaces
from quantine.source.gguf.splits import UNSAID, split_as_named, steps_in, takes_whole_words

BYTE_LEVEL: Final = "gpt2"
SENTENCEPIECE: Final = "llama"
"""What llama.cpp calls the kinds of tokenizers (``tokenizer.ggml.model``)."""
PROBE: Final = "a"
"""A text, to see what is put around it."""
SPECIAL: Final = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}
"""What llama.cpp calls the numbers of special tokens, by what transformers calls these."""


def as_file_says(tokenizer: Any, file: GGUFFile) -> Any:
    """A tokenizer that has the file's tokens alone, and makes of text what the file says.

    Args:
        tokenizer: what transformers made of the file; it may be changed.
        file: the header.

    Raises:
        CheckpointError: the file names a way to split text that is not known, or that the class of
            ``tokenizer`` would lose; or a special token is another than the file says, or is put
            around texts but not named.
    """
    _split_as_said(tokenizer, file)
    if file.metadata.get("tokenizer.ggml.model") == SENTENCEPIECE:
        prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
        put_spaces(tokenizer.backend_tokenizer, bool(prefix))
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, Length):
        return tokenizer
    for token, key in SPECIAL.items():
        number, word = file.metadata.get(f"tokenizer.ggml.{key}", -1), getattr(tokenizer, token)
        there = word is not None and 0 <= number < tokens.items
        if there and tokenizer.convert_tokens_to_ids(word) != number:
            raise CheckpointError(
                f"{file.path}: its {token} is number {number}, but transformers reads it as "
                f"{cut(word)}, which is another: give the model's directory with its tokenizer.json"
            )
    _put_around_as_said(tokenizer, file)
    return _without_others(tokenizer, tokens.items)


def _put_around_as_said(tokenizer: Any, file: GGUFFile) -> None:
    """Make ``tokenizer`` put those tokens before and after texts that llama.cpp does."""
    said, model = file.metadata, file.metadata.get("tokenizer.ggml.model")
    if model not in (BYTE_LEVEL, SENTENCEPIECE):
        return
    usual = model == SENTENCEPIECE or takes_whole_words(str(said.get("tokenizer.ggml.pre")))
    wanted = {
        "bos_token": bool(said.get("tokenizer.ggml.add_bos_token", usual)),
        "eos_token": bool(said.get("tokenizer.ggml.add_eos_token", False)),
    }
    for token, there in wanted.items():
        if there and getattr(tokenizer, token) is None:
            raise CheckpointError(
                f"{file.path}: texts get a {token}, but it has no tokenizer.ggml.{SPECIAL[token]}: "
                "give the model's directory with its tokenizer.json"
            )
    before, after = ([getattr(tokenizer, token)] * there for token, there in wanted.items())
    backend = tokenizer.backend_tokenizer
    plain = backend.encode(PROBE, add_special_tokens=False).tokens
    if backend.encode(PROBE).tokens != [*before, *plain, *after]:
        tokenizer.add_bos_token, tokenizer.add_eos_token = wanted.values()


def _split_as_said(tokenizer: Any, file: GGUFFile) -> None:
    """Make ``tokenizer`` split text as the file says, see `as_file_says`."""
    from transformers import PreTrainedTokenizerFast

    if file.metadata.get("tokenizer.ggml.model") != BYTE_LEVEL:
        return
    name, kind = file.metadata.get("tokenizer.ggml.pre", UNSAID), type(tokenizer)
    if name == UNSAID and kind is not PreTrainedTokenizerFast:
        return  # older than such names: the class has the way of the models that it is for
    said = f"{file.path}: its tokenizer splits text as {cut(name)} does (tokenizer.ggml.pre)"
    remedy = "give the model's directory with its tokenizer.json"
    if not split_as_named(tokenizer.backend_tokenizer, str(name)):
        raise CheckpointError(f"{said}, which is not known here: {remedy}")
    if kind is PreTrainedTokenizerFast:
        return
    # Such a class splits in its own way once it is loaded again, whatever its files say.
    again = steps_in(kind(vocab={"a": 0}, merges=[]).backend_tokenizer)
    if again != steps_in(tokenizer.backend_tokenizer):
        raise CheckpointError(f"{said}, but transformers' {kind.__name__} does not: {remedy}")


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
