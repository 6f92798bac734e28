"""What tokenizers of SentencePiece's kind make of spaces, by what GGUF files say of them.

llama.cpp puts a space before a text, and before what follows a special token, if the file says
``add_space_prefix`` or nothing, even where there is a space already.
"""

from __future__ import annotations

import json
from typing import Any, Final

SPACE: Final = "▁"
"""What spaces become."""
PREPEND: Final = {"type": "Prepend", "prepend": SPACE}
"""The step that puts a space before each piece of text between special tokens."""
REPLACE: Final = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
"""The step that replaces spaces."""
AROUND: Final = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
"""A step that finds nothing to split once spaces are replaced."""


def prefixed(normalizer: Any, splitter: Any) -> bool | None:
    """Whether a tokenizer puts a space before texts as llama.cpp does, or replaces spaces alone.

    Args:
        normalizer, splitter: the entries ``normalizer`` and ``pre_tokenizer`` of
            ``tokenizer.json``.

    Returns:
        ``None`` if it does neither.
    """
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    if splitter is None or (splitter == AROUND and REPLACE in steps):
        if steps == [PREPEND, REPLACE]:
            return True
        if steps == [REPLACE]:
            return False
    return None


def put_spaces(backend: Any, prefix: bool) -> None:
    """Make a ``tokenizers.Tokenizer`` treat spaces as llama.cpp does.

    Args:
        backend: made of a file of SentencePiece's kind; changed where it treats them otherwise.
        prefix: whether a space is put before texts.
    """
    from tokenizers import decoders, normalizers

    found = json.loads(backend.to_str())
    if prefixed(found["normalizer"], found["pre_tokenizer"]) is prefix:
        return
    replace = normalizers.Replace(" ", SPACE)
    before = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, replace])
    backend.pre_tokenizer = None
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
