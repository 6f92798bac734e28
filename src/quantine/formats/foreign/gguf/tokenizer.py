"""A tokenizer in the words of a GGUF file: byte-level BPE, or SentencePiece's kind of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from quantine.errors import FormatError, cut
from quantine.formats.directory import MORE_TEMPLATES
from quantine.formats.foreign.gguf.file import Value
from quantine.formats.foreign.gguf.naming import name_of
from quantine.formats.foreign.gguf.sentencepiece import NORMAL, sentencepiece_of
from quantine.source.gguf.config import FURTHER_ENDS
from quantine.source.gguf.splits import SPLITS, Split, steps_of

CONTROL: Final = 3
"""Type of a special token."""
ADDED: Final = 4
"""Type of a word that is found before text is split."""
UNUSED: Final = 5
"""Type of a row of the table without a word."""


def tokenizer_of(
    directory: Path, rows: int, ids: Mapping[str, Any]
) -> tuple[dict[str, Value], list[str]]:
    """The metadata of the tokenizer in ``directory``, and a name that does not change it.

    Args:
        directory: holds ``tokenizer.json``.
        rows: of the token table, of which the last may have no word.
        ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` of the model, if it has them;
            else they are the tokenizer's.

    Returns:
        Metadata, and what llama.cpp does otherwise, in sentences.

    Raises:
        FormatError: it is none that llama.cpp splits text like.
    """
    path = directory / "tokenizer.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        values, notes = _read(found, rows)
        called, others = name_of(directory.absolute().name, found["added_tokens"])
        own = _special(directory, found)
    except FormatError as error:
        raise FormatError(f"{path}: {error}: give llama.cpp the float model's tokenizer") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} cannot be read: {cut(error)}") from error
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    for short, name in names.items():
        said = ids.get(f"{short}_token_id")
        said = said[0] if isinstance(said, list) and said else said
        for token in (said, own.get(short)):
            if isinstance(token, int) and 0 <= token < rows:  # -1 is often none
                values.setdefault(f"tokenizer.ggml.{name}_token_id", token)
    if "tokenizer.ggml.eos_token_id" not in values:
        raise FormatError(
            f"neither config.json nor the tokenizer in {directory} says which token ends a text, "
            "and llama.cpp would take another: give config.json an eos_token_id"
        )
    before, after = _around(path)
    for short, added in {"bos": before, "eos": after}.items():
        number = values.get(f"tokenizer.ggml.{short}_token_id")
        if added not in ([], [number]):
            raise FormatError(
                f"{path} puts {added} around texts, but {short}_token_id of the model is {number}, "
                "which is all that GGUF files can say: make both the same"
            )
        if short == "bos" or added:
            values[f"tokenizer.ggml.add_{short}_token"] = bool(added)
    notes += _add_further_ends(values, directory, ids, rows)
    template, left_out = _template(directory)
    if template is not None:
        values["tokenizer.chat_template"] = template
    if left_out:
        notes.append(f"llama.cpp has one chat template: without {', '.join(left_out)}")
    if called is not None:
        values["general.name"] = called
    return values, [*notes, *others]


def _read(found: Mapping[str, Any], rows: int) -> tuple[dict[str, Value], list[str]]:
    """How ``tokenizer.json`` splits text, see `tokenizer_of`."""
    model = found["model"]
    if model["type"] != "BPE":
        raise FormatError("only BPE is written to GGUF files")
    words, kinds = _words(model["vocab"], found["added_tokens"], rows)
    if model.get("byte_fallback"):
        return sentencepiece_of(found, words, kinds)
    split = _split(found)
    _check_merging(found, split)
    values: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split.name,
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [
            m if isinstance(m, str) else " ".join(m) for m in model["merges"]
        ],
    }
    return values, []


def _check_merging(found: Mapping[str, Any], split: Split) -> None:
    """Refuse what llama.cpp does not look at: it merges as its name of the way to split says."""
    model = found["model"]
    for key in ("end_of_word_suffix", "continuing_subword_prefix", "dropout"):
        if model.get(key):
            raise FormatError(f"it has {key} = {model[key]!r:.40}, which GGUF files do not say")
    ignores, whole = bool(model.get("ignore_merges")), split.whole_words
    if ignores == whole:
        return
    made = {"".join(m.split(" ", 1) if isinstance(m, str) else m) for m in model["merges"]}
    made |= {token["content"] for token in found["added_tokens"]}
    if any(len(word) > 1 and word not in made for word in model["vocab"]):
        raise FormatError(
            f"it has ignore_merges = {ignores}, but llama.cpp takes {whole} for text that is "
            f"split in this way ({split.name})"
        )


def _words(
    vocabulary: Mapping[str, int], added: Sequence[Mapping[str, Any]], rows: int
) -> tuple[list[str], list[int]]:
    """Word and type of every row of the token table."""
    words = [f"[PAD{row}]" for row in range(rows)]
    kinds = [UNUSED] * rows
    known = [(word, number, NORMAL) for word, number in vocabulary.items()]
    for token in added:
        known.append((token["content"], token["id"], CONTROL if token["special"] else ADDED))
    for word, number, kind in known:
        if not 0 <= number < rows:
            raise FormatError(f"token {word!r:.40} is number {number}, but the table has {rows}")
        words[number], kinds[number] = word, kind
    return words, kinds


def _split(found: Mapping[str, Any]) -> Split:
    """The way in which the tokenizer splits text."""
    normalizer = found.get("normalizer")
    steps = steps_of(found.get("pre_tokenizer"))
    split = next((one for one in SPLITS if one.steps == steps), None)
    # llama.cpp composes no characters (NFC), and neither do its converters refuse that.
    plain = normalizer is None or normalizer.get("type") == "NFC"
    if not plain or split is None:
        raise FormatError(
            f"it splits text in a way for which no name in GGUF files is known here "
            f"({cut(steps, 60)})"
        )
    return split


def _special(directory: Path, found: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of the tokenizer's own first, last and padding token, as far as it has them."""
    settings = _settings(directory)
    numbers = {**found["model"]["vocab"]}
    numbers |= {token["content"]: token["id"] for token in found["added_tokens"]}
    said = {short: settings.get(f"{short}_token") for short in ("bos", "eos", "pad")}
    words = {k: v.get("content") if isinstance(v, dict) else v for k, v in said.items()}
    return {short: numbers[word] for short, word in words.items() if word in numbers}


def _around(path: Path) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after a text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    whole = tokenizer.encode("a").ids
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    for place in range(len(whole) - len(plain) + 1):
        if whole[place : place + len(plain)] == plain:
            return whole[:place], whole[place + len(plain) :]
    return whole, []


def _add_further_ends(
    values: dict[str, Value], directory: Path, ids: Mapping[str, Any], rows: int
) -> list[str]:
    """Add to ``values`` which tokens end an answer, too; llama.cpp has room for two.

    Returns:
        Sentences about those for which there is no room.
    """
    said = [
        ids.get("eos_token_id"),
        _json(directory / "generation_config.json").get("eos_token_id"),
    ]
    ends = [token for one in said for token in (one if isinstance(one, list) else [one])]
    first = values["tokenizer.ggml.eos_token_id"]
    further = [
        token
        for token in dict.fromkeys(ends)
        if isinstance(token, int) and 0 <= token < rows and token != first
    ]
    values |= dict(zip(FURTHER_ENDS, further, strict=False))
    left_out = further[len(FURTHER_ENDS) :]
    if not left_out:
        return []
    return [f"llama.cpp is not told that tokens {left_out} end an answer, too"]


def _template(directory: Path) -> tuple[str | None, list[str]]:
    """The chat template, if there is one, and the names of others."""
    stored, named = _settings(directory).get("chat_template"), {}
    if isinstance(stored, list):
        try:
            named = {one["name"]: one["template"] for one in stored}
        except (TypeError, KeyError) as error:
            raise FormatError(
                f"{directory / 'tokenizer_config.json'} has a chat_template without a name, or a "
                "name without a template: give it one as text"
            ) from error
    plain = directory / "chat_template.jinja"
    if plain.is_file():
        template: str | None = plain.read_text(encoding="utf-8")
    else:
        template = stored if isinstance(stored, str) else named.get("default")
    files = [path.stem for path in directory.glob(MORE_TEMPLATES)]
    return template, sorted({*named, *files} - {"default"})


def _settings(directory: Path) -> dict[str, Any]:
    """What ``tokenizer_config.json`` says; nothing if it is not there."""
    return _json(directory / "tokenizer_config.json")


def _json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; nothing if it is not there."""
    found: Any = {}
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FormatError(f"{path} cannot be read: {cut(error)}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} is no table, but {cut(found)}")
    return found
