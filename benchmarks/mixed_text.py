"""One calibration text of several: pieces of equal length take turns.

    python benchmarks/mixed_text.py wikitext2_valid.txt c4_en_train_1000.jsonl mixed.txt

Pieces end where lines do. The text ends with the shortest of those that it is made of, so each has
the same share of it, of its last eighth too, by which tuning judges.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from quantine.calibrate.text import read_text

PIECE: Final = 4096
"""Number of characters of a piece, at least."""


def main() -> None:
    """Write the mixed text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="+", help="name or file, as --calibration takes it")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    texts = [pieces(read_text(source, "calibration")) for source in arguments.text]
    # Not strict: the shortest decides.
    arguments.out.write_text("".join(piece for turn in zip(*texts, strict=False) for piece in turn))


def pieces(text: str) -> list[str]:
    """``text`` cut after the first line end that leaves at least `PIECE` characters."""
    found, length = [[]], 0
    for line in text.splitlines(keepends=True):
        if length >= PIECE:
            found.append([])
            length = 0
        found[-1].append(line)
        length += len(line)
    return ["".join(lines) + "\n" for lines in found]


if __name__ == "__main__":
    main()
