"""The verb `export`, of texts that it is to score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quantine.cli import build_parser
from quantine.errors import CalibrationError, PlanError

Packed = Callable[[str, str], Path]


def run(*arguments: object) -> None:
    parsed = build_parser().parse_args(["export", *map(str, arguments)])
    parsed.run(parsed)


def test_texts_are_checked_before_anything_is_written(packed: Packed, tmp_path: Path) -> None:
    out, to = packed("llama", "rtn"), tmp_path / "gguf"
    short = tmp_path / "short.txt"
    short.write_text("a")
    with pytest.raises(CalibrationError):
        run(out, to, "--to", "gguf", "--nearest", "--text", short)
    with pytest.raises(PlanError, match="add --nearest"):
        run(out, to, "--to", "gguf", "--text", "builtin")
    assert not to.exists()


def test_nothing_rounded_is_said(
    packed: Packed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["--text", "builtin", "--window", 16, "--limit", 1]
    run(packed("llama", "rtn"), tmp_path / "gguf", "--to", "gguf", "--nearest", *texts)
    assert "nothing was rounded" in capsys.readouterr().err
