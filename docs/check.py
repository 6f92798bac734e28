"""Check the documentation against the project: ``make docs``.

* Links to files and to headings of this repository lead somewhere.
* Python blocks compile; those of docs/format.md are run, with their assertions.
* YAML blocks are plans that quantine accepts.
* Lines that start with ``quantine`` parse with the real command line; lines that start with
  ``make`` name a target of the Makefile.
* docs/results.md is what benchmarks/results.py writes, docs/families.md what docs/families.py does.
* README.md stays short: 250 lines of at most 120 characters.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from quantine import Plan, QuantineError
from quantine.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CHANGELOG.md", "docs/*.md", "benchmarks/*.md")
RUN = ROOT / "docs" / "format.md"
WRITTEN = {"docs/results.md": "benchmarks/results.py", "docs/families.md": "docs/families.py"}
"""Pages that scripts write, with the script, whose function ``page`` returns the text."""
MOST_LINES, LONGEST_LINE = 250, 120
"""Of README.md."""

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def main() -> int:
    """Report every problem; the exit status is 1 if there is one."""
    pages = sorted(page for pattern in PAGES for page in ROOT.glob(pattern))
    problems = []
    blocks = 0
    for page in pages:
        text = page.read_text(encoding="utf-8")
        found = [(match[1], match[2]) for match in BLOCK.finditer(text)]
        blocks += len(found)
        problems += [f"{page.relative_to(ROOT)}: {problem}" for problem in _links(page, text)]
        for language, code in found:
            checks = _block(page, language, code)
            problems += [f"{page.relative_to(ROOT)}: {problem}" for problem in checks]
    for name, script in WRITTEN.items():
        written = _page(ROOT / script)
        if (ROOT / name).read_text(encoding="utf-8") != written:
            problems.append(f"{name} is not what {script} writes")
    problems += _too_long(ROOT / "README.md")
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    sys.stdout.write(f"{len(pages)} pages, {blocks} blocks, {len(problems)} problems\n")
    return 1 if problems else 0


def _page(script: Path) -> str:
    """The page that a script writes, which may import files beside it."""
    sys.path.insert(0, str(script.parent))
    try:
        written: str = runpy.run_path(str(script))["page"]()
    finally:
        sys.path.remove(str(script.parent))
    return written


def _too_long(page: Path) -> Iterator[str]:
    lines = page.read_text(encoding="utf-8").splitlines()
    if len(lines) > MOST_LINES:
        yield f"{page.name} has {len(lines)} lines, more than {MOST_LINES}"
    for number, line in enumerate(lines, 1):
        if len(line) > LONGEST_LINE:
            yield f"{page.name}:{number} has {len(line)} characters, more than {LONGEST_LINE}"


def _links(page: Path, text: str) -> Iterator[str]:
    for target in LINK.findall(BLOCK.sub("", text)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            yield f"link to {target}: no such file"
        elif anchor and anchor not in _anchors(file.read_text(encoding="utf-8")):
            yield f"link to {target}: no such heading"


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _block(page: Path, language: str, code: str) -> Iterator[str]:
    if language == "python":
        try:
            compiled = compile(code, f"{page.name}: python block", "exec")
            if page == RUN:
                exec(compiled, {"__name__": "example"})
        except Exception as error:
            yield f"python block fails: {error!r}"
    elif language == "yaml":
        try:
            Plan.from_dict(yaml.safe_load(code))
        except (yaml.YAMLError, QuantineError) as error:
            yield f"yaml block is no plan: {error}"
    elif language == "sh":
        yield from _commands(code)


def _commands(code: str) -> Iterator[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["quantine"] and not _parses(words[1:]):
            yield f"not a command of quantine: {line}"
        if words[:1] == ["make"]:
            for target in words[1:]:
                if "=" not in target and not re.search(rf"^{target}:", makefile, re.MULTILINE):
                    yield f"not a target of the Makefile: {target}"


def _parses(words: list[str]) -> bool:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            build_parser().parse_args(words)
        except SystemExit as stopped:
            return stopped.code == 0
    return True


if __name__ == "__main__":
    raise SystemExit(main())
