"""Perplexities of a model under schemes of weights and activations, one row for each.

    python benchmarks/schemes.py MODEL wikitext2_valid.txt --texts wikitext2_test.txt \
        --schemes W4A16 W4A8 W4A4 --variants - faithful tensor --json schemes.json

A variant is the suffix of a scheme's name; `-` is none. Rows in the file of numbers are not made
again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from quantine import Calibration, Plan, evaluate, quantize

NO_SUFFIX = "-"


def measured(asked: argparse.Namespace, scheme: str, scratch: Path) -> dict[str, Any]:
    """What the model is worth under ``scheme``."""
    calibration = Calibration(
        asked.calibration, asked.samples, asked.seqlen, bfloat16=asked.bfloat16
    )
    started = time.perf_counter()
    out = scratch / scheme
    report = quantize(asked.model, out, Plan.scheme(scheme), calibration).report
    seconds = time.perf_counter() - started
    reference = asked.model if asked.kl else None
    scores = scored(asked, out, reference, scratch)
    bits = report["totals"]["bits_per_weight"]
    return {"scheme": scheme, "bits_per_weight": bits, "seconds": seconds, "texts": scores}


def scored(
    asked: argparse.Namespace, model: str | Path, reference: str | None, scratch: Path
) -> dict[str, Any]:
    """Scores by text."""
    options = {"window": asked.window, "limit": asked.limit, "reference": reference}
    cache = scratch / "predictions" if reference else None
    found: dict[str, Any] = evaluate(model, asked.texts, cache=cache, **options)["texts"]
    return found


def show(row: dict[str, Any]) -> None:
    for name, score in row["texts"].items():
        kl = "" if score["kl"] is None else f"   KL {score['kl']:.4f}"
        error = f"{score['perplexity']:.3f} +- {score['stderr']:.2f}"
        print(f"{row['scheme']:24} {name}: {error}{kl}   {row['seconds']:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--schemes", nargs="+", required=True)
    parser.add_argument("--variants", nargs="+", default=[NO_SUFFIX])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--limit", type=int, default=256)
    parser.add_argument("--bfloat16", action="store_true", help="calibrate in bfloat16")
    parser.add_argument("--kl", action="store_true", help="compare with the float model, too")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    asked = parser.parse_args()
    rows = json.loads(asked.json.read_text(encoding="utf-8")) if asked.json.is_file() else []
    done = {row["scheme"] for row in rows}
    suffixes = ["" if variant == NO_SUFFIX else f"-{variant}" for variant in asked.variants]
    names = [scheme + suffix for scheme in asked.schemes for suffix in suffixes]
    with tempfile.TemporaryDirectory() as scratch:
        if "float" not in done:
            texts = scored(asked, asked.model, None, Path(scratch))
            rows.append({"scheme": "float", "seconds": 0.0, "texts": texts})
            show(rows[-1])
        for name in names:
            if name not in done:
                rows.append(measured(asked, name, Path(scratch)))
                show(rows[-1])
            asked.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
