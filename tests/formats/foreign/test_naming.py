"""Names in GGUF files do not change how llama.cpp splits text, but where the tokenizer is so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from quantine.formats.export import export
from quantine.formats.foreign.gguf.naming import name_of

Packed = Callable[[str, str], Path]


def token(content: str, *, rstrip: bool = False, lstrip: bool = False) -> dict[str, Any]:
    return {"content": content, "rstrip": rstrip, "lstrip": lstrip}


ENDS = [token(content) for content in ("<unk>", "<s>", "<|endoftext|>")]
PHI3 = [*ENDS, token("</s>", rstrip=True), token("<|user|>", rstrip=True)]
PLAIN = [*ENDS, token("</s>"), token("<|user|>")]
OTHERS = {
    "plain": PLAIN,
    "none": [],
    "no end of text": [one for one in PHI3 if one["content"] != "<|endoftext|>"],
    "one that keeps": [*PHI3, token("<|end|>")],
    "one that drops too much": [*PHI3[1:], token("<unk>", rstrip=True)],
    "one that drops before": [*PHI3, token("<|end|>", rstrip=True, lstrip=True)],
}


def is_read_as_phi3(name: str | None) -> bool:
    """What llama.cpp makes of a name."""
    return name is not None and ("phi-3" in name.lower() or "phi3" in name.lower())


@given(
    words=st.lists(
        st.sampled_from(["o", "PHI3", "Phi-3", "mini", "-", "modern-bert", "mistral"]), max_size=4
    ),
    kind=st.sampled_from(["phi-3", *OTHERS]),
)
def test_a_name_says_phi_3_where_the_tokenizer_is_so(words: list[str], kind: str) -> None:
    directory = "".join(words)
    name, notes = name_of(directory, PHI3 if kind == "phi-3" else OTHERS[kind])
    assert is_read_as_phi3(name) == (kind == "phi-3")
    if kind != "phi-3":
        assert name is None or "modern-bert" not in name.lower()
        assert name != "mistral"
    drops = kind in {"no end of text", "one that keeps"} or kind.startswith("one that drops")
    assert bool(notes) == drops
    assert all("keeps spaces beside special tokens" in note for note in notes)


def test_usual_names_stay() -> None:
    for name in ("SmolLM2-135M", "my-mistral-7b", "phi-2", "out"):
        assert name_of(name, PLAIN) == (name, [])
    assert name_of("my-Phi3", PHI3) == ("my-Phi3", [])


@pytest.mark.parametrize("name", ["ophi3", "Phi-3", "Modern-BERT", "mistral", "small"])
def test_files_of_any_directory(name: str, packed: Packed, tmp_path: Path) -> None:
    source = Path(shutil.copytree(packed("llama", "rtn"), tmp_path / name))
    file = export(source, tmp_path / "gguf", "gguf").path / "model.gguf"
    found = gguf.GGUFReader(file).get_field("general.name")
    assert (None if found is None else found.contents()) == (name if name == "small" else None)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    assert model.config.model_type == "llama"


def test_spaces_that_llama_cpp_keeps_are_said(packed: Packed, tmp_path: Path) -> None:
    source = Path(shutil.copytree(packed("llama", "rtn"), tmp_path / "source"))
    found = json.loads((source / "tokenizer.json").read_text())
    found["added_tokens"][1]["rstrip"] = True
    (source / "tokenizer.json").write_text(json.dumps(found))
    notes = export(source, tmp_path / "gguf", "gguf").notes
    assert any("drops beside </s>" in note for note in notes)
