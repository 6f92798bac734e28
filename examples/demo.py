"""Compare a float model with its quantized directory on text that calibration never saw.

python examples/demo.py demo demo-out
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

import quantine


def main() -> None:
    """Evaluate both and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="the float model")
    parser.add_argument("directory", type=Path, help="what quantine made of it")
    parser.add_argument("--window", type=int, default=1024, help="tokens; default 1024")
    parser.add_argument("--limit", type=int, default=8, help="windows; default 8")
    arguments = parser.parse_args()
    sizes = {"window": arguments.window, "limit": arguments.limit}

    before = quantine.evaluate(arguments.model, "builtin", **sizes)
    after = quantine.evaluate(arguments.directory, "builtin", **sizes)
    text = after["texts"]["builtin"]

    # A float model may come in a file of any format: compare with the same weights in 16 bit.
    report = json.loads((arguments.directory / "quantine_report.json").read_text())
    totals = report["totals"]
    kept = after["model_bytes"] - totals["quantized_bytes"]
    float_bytes = kept + 2 * totals["quantized_weights"]

    heads = ("", "perplexity, built-in text", "bits per weight", "MB")
    table = Table(*heads, box=None, pad_edge=False)
    for name, scores, bits, nbytes in (
        ("float", before, 16.0, float_bytes),
        (report["plan"]["name"], after, after["bits_per_weight"], after["model_bytes"]),
    ):
        found = scores["texts"]["builtin"]
        perplexity = f"{found['perplexity']:.2f} ± {found['stderr']:.2f}"
        table.add_row(name, perplexity, f"{bits:.3f}", f"{nbytes / 1e6:.1f}")
    console = Console()
    console.print(table)
    console.print(
        f"{text['tokens']:,} tokens of held-out text, {text['windows']} windows of "
        f"{text['window']}; bits per weight: of the matrices inside blocks, without the "
        "token table and the output head; float MB: the same tensors stored in 16 bit"
    )


if __name__ == "__main__":
    main()
