"""Write docs/families.md from docs/families.json, which ``make families`` measures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from quantine.survey.verdict import NOT_ROUNDED, UNBUILT

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "families.json"
PAGE = HERE / "families.md"
INTRO = """\
# Families

Made by `make families`, which tries every causal language model of the installed transformers on a
small random model of its default configuration: `quantine families`. *Weights*: quantized with RTN,
GPTQ and SpQR at 4 bits, saved and loaded, it gives the logits of the float model with the
dequantized weights. *Activations*: they can be rounded (`--scheme W4A8`), keys and values among
them, and the loaded model computes as its files say; *in part*: some are left in 16 bit, for
[these reasons](#activations-that-are-not-rounded). *Native*: the native decoder generates with it.

Architectures are not listed by hand. What shares an input and what runs after what is found by
running a small model, whose blocks then have to run one by one with the same outputs. [Reorders of
activations](activations.md#which-models) are found and proved on it, too. A literal in
`src/quantine/families` overrides that: see [Adding a family](adding.md#a-family). Real models
differ from default configurations, so each is looked at when it is quantized, whatever this page
says.
"""


def page() -> str:
    """The whole page."""
    rows = json.loads(SOURCE.read_text(encoding="utf-8"))
    built = [row for row in rows if not row["reason"].startswith(UNBUILT)]
    refused = [row for row in built if not row["weights"]]
    done = len(built) - len(refused)
    rounded, native = (sum(row[part] for row in rows) for part in ("activations", "native"))
    partly = sum(NOT_ROUNDED in row["reason"] for row in rows)
    counts = (
        f"Of {len(rows)} classes, {len(built)} can be built small from their defaults. Weights of "
        f"{done} of these are quantized: {done / len(built):.1%}; the other {len(refused)} are "
        f"refused. Activations of {rounded} can be rounded, of {partly} of them in part; {native} "
        "are decoded natively."
    )
    lines = [INTRO, counts, "", "| class | weights | activations | native |", "|---|---|---|---|"]
    lines += [_row(row) for row in built if row["weights"]]
    lines += ["", *_left_alone(rows)]
    lines += ["", "## Refused", "", "| class | reason |", "|---|---|"]
    lines += [f"| {row['class']} | {_text(row['reason'])} |" for row in refused]
    lines += ["", "## Not tried", "", "| class | reason |", "|---|---|"]
    lines += [f"| {row['class']} | {_text(row['reason'])} |" for row in rows if row not in built]
    return "\n".join([*lines, ""])


def _left_alone(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """A section with each reason why activations are not rounded, and the classes that it holds of.

    What of a class is left for a reason is in the JSON file, and in a run's report.
    """
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for reason in str(row["reason"]).split("; ") if row["weights"] else ():
            if reason.startswith(NOT_ROUNDED):
                _, _, why = reason.removeprefix(NOT_ROUNDED).partition(": ")
            elif not row["activations"] and not reason.startswith("no native decoder"):
                why = reason
            else:
                continue
            found.setdefault(why, {})[str(row["class"])] = None
    lines = ["## Activations that are not rounded", "", "| reason | classes |", "|---|---|"]
    ranked = sorted(found.items(), key=lambda one: -len(one[1]))
    lines += [f"| {_text(why)} | {len(names)}: {', '.join(names)} |" for why, names in ranked]
    return lines


def _row(row: dict[str, object]) -> str:
    parts = {part: "yes" if row[part] else "no" for part in ("weights", "activations", "native")}
    if NOT_ROUNDED in str(row["reason"]):
        parts["activations"] = "in part"
    return f"| {row['class']} | {' | '.join(parts.values())} |"


def _text(reason: str) -> str:
    return reason.replace("|", "\\|").replace("<", "\\<").replace("\n", " ")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
