"""Quality against size: one model, several plans, one table and one picture.

A point is a budget in bits per weight (``3.65``), a preset or method with parameters
(``spqr-faithful,bits=4,threshold=inf``), or a plan file. Points that the table has already are
skipped, so a list can grow. Sizes are counted from the files; the float model's predictions are
computed once and kept in float16, which blurs the divergence by about 1e-5 nats.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import quantine
from quantine.eval.perplexity import Score, cut_windows, perplexity_of, score_windows
from quantine.eval.predictions import Predictions
from quantine.runtime.modules import QuantLinear, packed_modules
from quantine.runtime.source import locate

WITHIN = 1.01
"""Perplexity over the float model's that counts as nearly lossless (SpQR, section 5)."""


def main() -> None:
    arguments = parse()
    texts = dict(text.split("=", 1) for text in arguments.texts)
    source = locate(arguments.model)
    vocabulary = source.config().vocab_size
    windows = {
        name: cut_windows(source, text, arguments.window, arguments.limit, vocabulary)
        for name, text in texts.items()
    }
    reference = Predictions(source, torch.float32, arguments.work.with_suffix(".predictions"))
    rows = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    done = {row["point"] for row in rows}
    for point in ["float", *arguments.points]:
        if point not in done:
            rows.append({"point": point, **measured(point, arguments, windows, reference)})
            arguments.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
            print(json.dumps(rows[-1]), flush=True)
    print_rows(rows, list(texts))
    if arguments.plot is not None:
        plot(rows, list(texts), arguments.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="as of `quantine quantize`")
    parser.add_argument("points", nargs="+", help="3.65, spqr-3bit, gptq,bits=3, or plan.yaml")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--texts", nargs="+", default=["builtin=builtin"], metavar="NAME=FILE")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--work", type=Path, default=Path("curve-out"), help="scratch directory")
    parser.add_argument("--out", type=Path, default=Path("curve.json"))
    parser.add_argument("--plot", type=Path, help="a .png or .svg file")
    return parser.parse_args()


def plan_of(point: str) -> quantine.Plan:
    """The plan that ``point`` names."""
    name, *fields = point.split(",")
    if Path(point).suffix in {".yaml", ".yml", ".json"}:
        return quantine.Plan.from_file(point)
    if name.replace(".", "", 1).isdigit():
        return quantine.Plan.budget(float(name))
    return quantine.Plan.preset(
        name, **yaml.safe_load("{" + ", ".join(fields).replace("=", ": ") + "}")
    )


def measured(
    point: str, arguments: argparse.Namespace, windows: dict[str, Tensor], reference: Predictions
) -> dict[str, Any]:
    """Quantize and score; the float model itself for the point ``float``."""
    if point == "float":
        scores = {
            name: list(score_windows(reference.model, None, cut)) for name, cut in windows.items()
        }
        return {"bits": None, "texts": {name: summary(score) for name, score in scores.items()}}
    shutil.rmtree(arguments.work, ignore_errors=True)
    calibration = quantine.Calibration(
        arguments.calibration, arguments.samples, arguments.seqlen, 0, bfloat16=True
    )
    started, cpu = time.perf_counter(), time.process_time()
    result = quantine.quantize(arguments.model, arguments.work, plan_of(point), calibration)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    layers, totals = result.report["layers"], result.report["totals"]
    model = decoded(quantine.load(arguments.work, torch.float32)[0])
    scores = {name: list(score_windows(model, reference, cut)) for name, cut in windows.items()}
    return {
        "bits": totals["bits_per_weight"],
        "outliers": sum(layer["outliers"] for layer in layers) / totals["quantized_weights"],
        "seconds": seconds,
        "cpu_seconds": cpu,
        "solver_seconds": sum(layer["seconds"] for layer in layers),
        "texts": {name: summary(score) for name, score in scores.items()},
    }


def decoded(model: nn.Module) -> nn.Module:
    """``model`` with float matrices: many windows are cheaper than decoding for each."""
    for name, module in list(packed_modules(model)):
        if isinstance(module, QuantLinear):
            weight = module.dequantize()
            linear = nn.Linear(*weight.T.shape, bias=False)
            linear.weight, linear.bias = nn.Parameter(weight), module.bias
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
    return model


def summary(scores: list[Score]) -> dict[str, Any]:
    """Perplexity with its standard error, divergence in nats per token, and top-1 agreement."""
    tokens = sum(score.tokens for score in scores)
    perplexity, error = perplexity_of(scores)
    return {
        "perplexity": perplexity,
        "stderr": error,
        "kl": sum(score.kl for score in scores) / tokens,
        "top1": sum(score.agree for score in scores) / tokens,
    }


def print_rows(rows: list[dict[str, Any]], texts: list[str]) -> None:
    heads = [f"{text} {kind}" for text in texts for kind in ("perplexity", "KL", "top-1")]
    table = Table("point", "bits", "outliers", *heads, "s", "CPU s", "solver s", box=None)
    for row in sorted(rows, key=lambda row: row["bits"] or 0):
        cells = [row["point"]]
        exact = row["bits"] is None
        cells += ["", ""] if exact else [f"{row['bits']:.3f}", f"{row['outliers']:.2%}"]
        for text in texts:
            found = row["texts"][text]
            cells.append(f"{found['perplexity']:.3f} ± {found['stderr'] or 0:.2f}")
            cells += ["", ""] if exact else [f"{found['kl']:.4f}", f"{found['top1']:.1%}"]
        if not exact:
            cells += [f"{row[key]:.0f}" for key in ("seconds", "cpu_seconds", "solver_seconds")]
        table.add_row(*cells)
    Console(width=200).print(table)


def plot(rows: list[dict[str, Any]], texts: list[str], path: Path) -> None:
    """Perplexity over the float model's against bits, with the line of one percent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    exact = next(row for row in rows if row["point"] == "float")["texts"]
    budgets = [row for row in rows if row["point"].replace(".", "", 1).isdigit()]
    budgets.sort(key=lambda row: row["bits"])
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for text in texts:
        ratio = [row["texts"][text]["perplexity"] / exact[text]["perplexity"] for row in budgets]
        axes.plot([row["bits"] for row in budgets], ratio, marker="o", label=text)
    axes.axhline(WITHIN, linestyle="--", color="grey", label="1% above float")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.2f}")
    axes.yaxis.set_minor_formatter("{x:.1f}")
    axes.set_xlabel("bits per weight, counted from the files")
    axes.set_ylabel("perplexity / perplexity of the float model")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
