"""A tokenizer of SentencePiece's kind in the words of a GGUF file: merges by score, and bytes.

llama.cpp joins whichever neighbours make the word with the highest score, and ``tokenizer.json``
whichever pair is first in its list of merges. Both are the same where that list has every way to
make each word, word after word: so it is in tokenizers that were converted from SentencePiece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from quantine.errors import FormatError, shown
from quantine.formats.foreign.gguf.file import Value
from quantine.source.gguf.spaces import SPACE, prefixed

NORMAL: Final = 1
"""Type of a word of the vocabulary."""
UNKNOWN: Final = 2
"""Type of the word that stands for what no word is for."""
BYTE: Final = 6
"""Type of a word that stands for one byte."""
BYTES: Final = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""Words that stand for bytes."""
NEVER_MADE: Final = -1e9
"""Score of words that no merge makes, below all others."""


def sentencepiece_of(
    found: Mapping[str, Any], words: Sequence[str], kinds: Sequence[int]
) -> tuple[dict[str, Value], list[str]]:
    """The metadata of a tokenizer with merges and words for single bytes.

    Args:
        found: ``tokenizer.json``.
        words: of every row of the token table.
        kinds: type of each.

    Returns:
        Metadata, and what llama.cpp does otherwise, in sentences.

    Raises:
        FormatError: llama.cpp would find other words in a text; the message says why.
        LookupError, TypeError, ValueError, AttributeError: the tokenizer is damaged.
    """
    model = found["model"]
    prefix, notes = _prefix(found.get("normalizer"), found.get("pre_tokenizer"))
    lost = [byte for byte in BYTES if byte not in model["vocab"]]
    if lost:
        raise FormatError(f"it has no word for {len(lost)} bytes, such as {lost[0]}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(key):
            raise FormatError(f"it has {key} {shown(model[key])}, which GGUF files do not say")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    unknown = model.get("unk_token")
    special = {**dict.fromkeys(BYTES, BYTE), unknown: UNKNOWN}
    kinds = [special.get(word, kind) for word, kind in zip(words, kinds, strict=True)]
    values: dict[str, Value] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": _scores(words, kinds, merges),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    if unknown is not None:
        values["tokenizer.ggml.unknown_token_id"] = model["vocab"][unknown]
    return values, notes


def _prefix(normalizer: Any, splitter: Any) -> tuple[bool, list[str]]:
    """Whether a space is put before a text, and what llama.cpp does otherwise there."""
    prefix = prefixed(normalizer, splitter)
    if prefix is not None:
        return prefix, []
    kind = splitter or {}
    metaspace = kind.get("type") == "Metaspace" and kind.get("replacement") == SPACE
    changes = normalizer is not None and normalizer.get("normalizers") != []
    if metaspace and not changes and not kind.get("split", True):
        if kind["prepend_scheme"] == "never":
            return False, []
        return True, [
            "llama.cpp puts a space before every text, also one that begins with a space or "
            "follows a special token"
        ]
    raise FormatError(
        f"it changes spaces in a way that GGUF files do not say (normalizer {shown(normalizer)}, "
        f"pre_tokenizer {shown(splitter)})"
    )


def _scores(
    words: Sequence[str], kinds: Sequence[int], merges: Sequence[tuple[str, ...]]
) -> list[float]:
    """A score for every word: the earlier a merge makes it, the higher.

    Raises:
        FormatError: merges of several words alternate, or a word is not made in every way.
    """
    places: dict[str, int] = {}
    last = ""
    for pair in merges:
        made = "".join(pair)
        if made in places and made != last:
            raise FormatError(f"its merges make {made!r:.40} at several places of their order")
        places.setdefault(made, len(places))
        last = made
    known, pairs = {word for word in words if len(word) == 1} | places.keys(), set(merges)
    for word, kind in zip(words, kinds, strict=True):
        ways = range(1, len(word)) if kind == NORMAL else ()
        for cut in ways:
            pair = word[:cut], word[cut:]
            if pair not in pairs and pair[0] in known and pair[1] in known:
                raise FormatError(
                    f"its merges do not make {word!r:.40} of {pair[0]!r:.40} and {pair[1]!r:.40}, "
                    "which llama.cpp does"
                )
    return [float(-places[word]) if word in places else NEVER_MADE for word in words]
