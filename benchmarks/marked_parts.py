"""Parts of pages that a program writes, each between two comments that name it."""

from __future__ import annotations

from pathlib import Path

MARK = "<!-- {} of the part that benchmarks/{} writes: {} -->"


def write_part(page: Path, program: str, name: str, text: str) -> None:
    """Put ``text`` between the two marks of ``program`` for ``name`` in ``page``."""
    begin, end = (MARK.format(side, program, name) for side in ("Begin", "End"))
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{page} has no part {name!r} between its two marks")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
