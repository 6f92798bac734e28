"""docs/adding.md, followed literally on a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

import quantine

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs" / "adding.md"
BLOCK: Final = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE: Final = re.compile(r"(?:#|//) ((?:src|csrc)/\S+)\n")


def sections() -> dict[str, list[tuple[str, str]]]:
    """The blocks of each section, ``(language, text)``."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {
        title: [(match[1], match[2]) for match in BLOCK.finditer(text)]
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }


SECTIONS: Final = sections()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project after every step of the page."""
    root = tmp_path_factory.mktemp("project")
    unwanted = shutil.ignore_patterns("__pycache__")
    # With the extension, wherever the package that is tested comes from.
    shutil.copytree(Path(quantine.__file__).parent, root / "src" / "quantine", ignore=unwanted)
    for name in ("csrc", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=unwanted)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    for blocks in SECTIONS.values():
        for language, text in blocks:
            follow(root, language, text)
    return root


def follow(root: Path, language: str, text: str) -> None:
    """Carry out the step that a block describes; other blocks are for reading."""
    named = FILE.match(text)
    if language == "diff":
        name, *lines = text.splitlines()
        apply(root / name.removeprefix("--- "), lines)
    elif named is not None:
        path = root / named[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        assert not path.exists(), f"{path} is there already"
        path.write_text(text[named.end() :], encoding="utf-8")


def apply(path: Path, lines: list[str]) -> None:
    """Put each added line behind the line above it, which the file must have exactly once."""
    found, place = path.read_text(encoding="utf-8").splitlines(), -1
    for line in lines:
        mark, content = line[:1], line[1:]
        if mark == "+":
            place += 1
            found.insert(place, content)
            continue
        assert found.count(content) == 1, (
            f"{path.name} has {content!r} {found.count(content)} times"
        )
        place = found.index(content)
        if mark == "-":
            del found[place]
            place -= 1
    path.write_text("\n".join([*found, ""]), encoding="utf-8")


def python(project: Path, *arguments: str) -> str:
    """Run Python on the copy; its output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


CONTRACTS: Final = {
    "tests/contracts/test_solvers.py": ("Pick", "every_method"),
    "tests/families/test_table.py": ("stablelm",),
    "tests/end_to_end/test_families.py": ("stablelm",),
    "tests/contracts/test_formats.py": ("bytewise",),
    "tests/test_imports.py": ("point_down", "circle"),
}
"""What must pass on the copy: files, and words in the names of their tests."""


def test_every_section_has_steps_to_follow() -> None:
    for title, blocks in SECTIONS.items():
        files = [text for language, text in blocks if language == "diff" or FILE.match(text)]
        assert files, title


def test_what_was_added_keeps_the_contracts(project: Path) -> None:
    words = {word for words in CONTRACTS.values() for word in words}
    options = ("-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-rp", "-o", "addopts=")
    out = python(project, "-m", "pytest", *options, *CONTRACTS, "-k", " or ".join(words))
    passed = [line for line in out.splitlines() if line.startswith("PASSED ")]
    for file, words_of_file in CONTRACTS.items():
        for word in words_of_file:
            assert any(file in line and word in line for line in passed), (file, word, out)


def test_what_was_added_works_together(project: Path, tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, "tests")
import torch
import quantine
from quantine.eval.entropy import entropy
from quantine.runtime.packed import packed_modules
from tiny_models import build, tiny_config, logits_of, with_weights

model = build(tiny_config("stablelm"), {str(tmp_path / "model")!r})
open({str(tmp_path / "text.txt")!r}, "w").write("To be, or not to be. " * 200)
calibration = quantine.Calibration({str(tmp_path / "text.txt")!r}, samples=4, seqlen=32)
plan = quantine.Plan.from_dict({{"arithmetic": "exact", "rules": [
    {{"match": "@blocks", "method": "pick", "bits": 4, "group_size": 16, "format": "bytewise"}}]}})
out = quantine.quantize(model, {str(tmp_path / "out")!r}, plan, calibration).path
loaded, _ = quantine.load(out)
decoded = {{name: module.dequantize() for name, module in packed_modules(loaded)}}
expected = logits_of(with_weights(model, decoded))
torch.testing.assert_close(logits_of(loaded), expected, atol=1e-5, rtol=1e-5)
found = entropy(loaded, torch.arange(64).view(2, 32))
assert 0 < found["entropy"] < 6 and found["stderr"] >= 0 and found["tokens"] == 64
from quantine.kernels import backend
from quantine.kernels.parity.reference import odd_codes_reference
assert odd_codes_reference(torch.arange(10, dtype=torch.uint8).view(2, 5)).tolist() == [2, 3]
"""
    python(project, "-c", program)
    page = python(project, "-m", "quantine.cli", "report", str(tmp_path / "out"))
    written = (tmp_path / "out" / "quantine_report.html").read_text(encoding="utf-8")
    assert f"Made from {tmp_path / 'model'}." in written, page
