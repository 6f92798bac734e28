"""Write the tables of README.md and docs/kernels.md from `benchmarks/against_llama_cpp.py`'s JSON.

python benchmarks/llama_cpp_tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from marked_parts import write_part

ROOT: Final = Path(__file__).resolve().parent.parent
MODELS: Final = {"demo": "SmolLM2-135M (`demo`)", "qwen": "Qwen2.5-Coder-0.5B"}
"""Files ``against-llama-cpp-NAME.json``, and what the models are."""
KINDS: Final = ("prompt", "after 128", "after 4096")
SHORT: Final = ("after 128", "prompt")
"""Kinds of speed in README.md."""


def main() -> None:
    """Write both tables."""
    results = ROOT / "benchmarks" / "results"
    found = {
        name: json.loads((results / f"against-llama-cpp-{name}.json").read_text("utf-8"))
        for name in MODELS
    }
    whole = "\n\n".join(
        f"{MODELS[name]}:\n\n{table(one, KINDS)}\n\n{conditions(one)}"
        for name, one in found.items()
    )
    parts = {"README.md": table(found["demo"], SHORT), "docs/kernels.md": whole}
    for page, text in parts.items():
        write_part(ROOT / page, Path(__file__).name, "speeds", text)


def table(found: dict[str, Any], kinds: tuple[str, ...]) -> str:
    """A line for each file: its size, what it loses, and its speed on one and two threads.

    Speeds are left out where they were not measured (``--only quality``).
    """
    kinds = kinds if "rounds" in found else ()
    head = ["", "MB", "perplexity", "KL", *(f"{kind}: 1 / 2 threads" for kind in kinds)]
    lines = [_line(head), "|---" * len(head) + "|"]
    for row in found["rows"]:
        here = row["here"]
        cells = [f"{row['file_bytes'] / 1e6:.1f}", f"{here['perplexity']:.3f}", f"{here['kl']:.4f}"]
        cells += [_speeds(row.get("tokens_per_second"), kind) for kind in kinds]
        lines.append(_line([_name(row), *cells]))
    return "\n".join(lines)


def conditions(found: dict[str, Any]) -> str:
    """What the numbers were measured on."""
    text = (
        f"{found['windows']} windows of {found['window']} held-out tokens; {found['samples']} "
        "segments of calibration text."
    )
    if "rounds" not in found:
        return f"*{text} Speeds were not measured.*"
    return (
        f"*{text} Tokens/s: medians of {found['rounds']} rounds by turns; kernels for "
        f"{found['level']}.*"
    )


def _name(row: dict[str, Any]) -> str:
    if row["by"] == "quantine":
        return f"**quantine, {row['name']}**"
    return "float" if row["by"] == "float" else f"llama.cpp {row['name']}"


def _speeds(speeds: dict[str, float] | None, kind: str) -> str:
    if speeds is None:
        return ""
    return " / ".join(f"{speeds[f'{kind}, {threads} threads']:.0f}" for threads in (1, 2))


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
