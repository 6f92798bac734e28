"""What a GGUF file is called: readers infer from that what the file does not say otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from quantine.errors import cut

PHI3: Final = ("phi-3", "phi3")
"""Words in a name, in any case, by which llama.cpp (2026) drops spaces after special tokens."""
KEPT_IN_PHI3: Final = ("<unk>", "<s>", "<|endoftext|>")
"""Special tokens after which it then keeps them; without these words it refuses the file."""
ALWAYS_IN_PHI3: Final = "</s>"
"""A token after which it then drops them, without which it refuses the file, too."""
OTHERS: Final = ("modern-bert",)
"""Words in a name by which llama.cpp takes spaces before another token away."""
TAKEN: Final = ("mistral",)
"""Whole names by which transformers takes a file of the architecture ``llama`` for another."""


def name_of(directory: str, added: Sequence[Mapping[str, Any]]) -> tuple[str | None, list[str]]:
    """The name in a GGUF file, and what llama.cpp does otherwise with the tokenizer.

    llama.cpp splits text as Phi-3 does if the name says so, and only then. So a name says it if the
    tokenizer is like that of Phi-3, wherever it comes from, and does not say it otherwise.

    Args:
        directory: the name of the model's directory.
        added: the special and added tokens of ``tokenizer.json``.

    Returns:
        The name, ``None`` where there is to be none; and sentences.
    """
    said = directory.lower()
    is_phi3 = any(word in said for word in PHI3)
    if _spaces_as_in_phi3(added):
        return (directory if is_phi3 else f"{directory} (phi-3)"), []
    dropping = [str(token["content"]) for token in added if _drops_spaces(token)]
    notes = [
        f"llama.cpp keeps spaces beside special tokens, which the tokenizer drops beside {cut(one)}"
        for one in dropping[:1]
    ]
    misread = is_phi3 or said in TAKEN or any(word in said for word in OTHERS)
    return (None if misread else directory), notes


def _drops_spaces(token: Mapping[str, Any]) -> bool:
    return bool(token.get("lstrip") or token.get("rstrip"))


def _spaces_as_in_phi3(added: Sequence[Mapping[str, Any]]) -> bool:
    """Whether spaces are dropped after just those tokens after which llama.cpp does it there."""
    drops = {token["content"]: bool(token.get("rstrip")) for token in added}
    if not {*KEPT_IN_PHI3, ALWAYS_IN_PHI3} <= drops.keys():
        return False
    if any(token.get("lstrip") for token in added):
        return False
    return all(drop != (content in KEPT_IN_PHI3) for content, drop in drops.items())
