"""The small files of a tokenizer: which are copied, and when there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantine.formats.tokenizer_files import VOCABULARIES, copy_small_files, has_tokenizer


@pytest.mark.parametrize("name", VOCABULARIES)
def test_every_vocabulary_is_copied(name: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "notes.txt").write_bytes(b"not of the tokenizer")
    assert not has_tokenizer(source)
    (source / name).write_bytes(b"words")
    assert has_tokenizer(source)
    copy_small_files(source, out)
    assert [(file.name, file.read_bytes()) for file in out.iterdir()] == [(name, b"words")]


def test_all_chat_templates_are_copied(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "additional_chat_templates").mkdir(parents=True)
    out.mkdir()
    (source / "chat_template.jinja").write_text("usual")
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    copy_small_files(source, out)
    assert (out / "chat_template.jinja").read_text() == "usual"
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "with tools"
