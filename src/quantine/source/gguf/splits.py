"""How byte-level tokenizers split text before they merge, by the names that GGUF files have for it.

The names are those of llama.cpp (``tokenizer.ggml.pre``). transformers knows some of them, and
splits as GPT-2 does where it knows none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

BYTES: Final = "bytes"
"""The step that splits as GPT-2 does."""
DIGITS: Final = "digits"
"""The step that takes digits one by one."""
LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 splits text."""
QWEN2: Final = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
"""How Qwen 2 and 3 split text."""
BLOOM: Final = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"
"""How BLOOM splits text."""
PUNCTUATION: Final = r"[\p{P}\$\+<=>\^~\|]+"
BACKTICKED: Final = PUNCTUATION.replace("]", "`]")
"""Steps of llama.cpp's default and of Falcon that take punctuation, whole."""
WORDS: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
NUMBERS: Final = r"\p{N}+"
THREE_DIGITS: Final = "[0-9][0-9][0-9]"
UNSAID: Final = "default"
"""llama.cpp's name of the way of files that do not say how text is split."""


@dataclass(frozen=True)
class Split:
    """A way to split text.

    Attributes:
        name: llama.cpp's name of it.
        steps: `BYTES`, `DIGITS` or patterns, one after the other.
        aliases: further names of llama.cpp for the same.
        whole_words: whether llama.cpp, with these names, takes words of the vocabulary whole,
            whatever merges say (``ignore_merges``).
    """

    name: str
    steps: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    whole_words: bool = False


SPLITS: Final = (
    Split("gpt-2", (BYTES,), ("phi-2", "mpt", "olmo", "jais", "exaone4", "trillion")),
    Split(
        "smollm",
        (DIGITS, BYTES),
        ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    Split(
        "llama-bpe",
        (LLAMA3,),
        ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        whole_words=True,
    ),
    Split("qwen2", (QWEN2,), ("deepseek-r1-qwen", "stablelm2")),
    Split("bloom", (BLOOM,), ("gpt3-finnish",)),
    Split("falcon", (BACKTICKED, WORDS, THREE_DIGITS)),
    Split(UNSAID, (PUNCTUATION, WORDS, NUMBERS, THREE_DIGITS)),
)
"""Ways to split text whose names are understood."""
WHOLE_WORDS: Final = ("tekken",)
"""Further names of ways that transformers knows, with which words are taken whole, too."""


def steps_of(stages: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The steps of a ``pre_tokenizer`` of ``tokenizer.json``, as `Split` has them.

    Args:
        stages: the entry; ``None`` is one that is not there.

    Returns:
        The steps; one that no `Split` has is the name of its kind.
    """
    listed = stages or {}
    parts = listed["pretokenizers"] if listed.get("type") == "Sequence" else [listed]
    return tuple(step for part in parts for step in _step(part))


def _step(stage: Mapping[str, Any]) -> list[str]:
    kind = stage.get("type")
    if kind == "Digits" and stage.get("individual_digits"):
        return [DIGITS]
    if kind == "ByteLevel" and not stage.get("add_prefix_space"):
        return [BYTES] if stage.get("use_regex", True) else []
    if kind == "Split" and not stage.get("invert") and stage.get("behavior") == "Isolated":
        return [str(stage["pattern"]["Regex"])]
    return [str(kind)]


def named(name: str) -> Split | None:
    """The way to split text that a GGUF file calls ``name``, if it is understood."""
    return next((s for s in SPLITS if name in (s.name, *s.aliases)), None)


def split_as_named(backend: Any, name: str) -> bool:
    """Make a tokenizer split text as a GGUF file says.

    Args:
        backend: a ``tokenizers.Tokenizer`` of byte-level BPE that transformers made of the file;
            it is changed where it splits otherwise.
        name: what the file calls its way to split text.

    Returns:
        Whether the way is known, here or to transformers.
    """
    steps, wanted = steps_in(backend), named(name)
    if wanted is not None and steps != wanted.steps:
        backend.pre_tokenizer = _pre_tokenizer(wanted.steps)
    if takes_whole_words(name):
        backend.model.ignore_merges = True
    # GPT-2's is what transformers takes where it does not know a name.
    return wanted is not None or steps != (BYTES,)


def takes_whole_words(name: str) -> bool:
    """Whether llama.cpp takes words whole where a file calls its way to split text ``name``.

    With these names it puts the first token before texts, too, where files do not say whether to.
    """
    wanted = named(name)
    return name in WHOLE_WORDS or (wanted is not None and wanted.whole_words)


def steps_in(backend: Any) -> tuple[str, ...]:
    """The steps in which a ``tokenizers.Tokenizer`` splits text, see `steps_of`."""
    stages = backend.pre_tokenizer
    return steps_of(None if stages is None else json.loads(stages.__getstate__()))


def _pre_tokenizer(steps: tuple[str, ...]) -> Any:
    """What splits text in ``steps``, and writes bytes in the alphabet of GPT-2."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    own = [step for step in steps if step != BYTES]
    stages = [
        Digits(individual_digits=True) if step == DIGITS else Split(Regex(step), "isolated")
        for step in own
    ]
    return Sequence([*stages, ByteLevel(add_prefix_space=False, use_regex=BYTES in steps)])
