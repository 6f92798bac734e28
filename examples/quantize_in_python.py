"""Quantize a model, look at what it cost, load the result and let it speak.

python examples/quantize_in_python.py demo out
"""

from __future__ import annotations

import sys

from rich.console import Console

import quantine


def main(model: str, out: str) -> None:
    """Quantize ``model`` into the new directory ``out`` and use it."""
    console = Console()

    # A preset treats every matrix in the decoder blocks alike. `quantine.Plan.from_file` reads
    # rules instead, such as examples/plan.yaml.
    plan = quantine.Plan.preset("gptq", bits=4, group_size=32, damp=0.01)
    calibration = quantine.Calibration("builtin", samples=32, seed=0)

    # `resume` lets the same call continue where an interrupted one stopped.
    result = quantine.quantize(model, out, plan, calibration, resume=True)

    worst = max(result.report["layers"], key=lambda layer: layer["output_error"])
    console.print(f"{result.report['totals']['bits_per_weight']:.3f} bits per quantized weight")
    console.print(f"largest output error: {worst['output_error']:.2%} in {worst['name']}")

    scores = quantine.evaluate(out, "builtin", limit=4)["texts"]["builtin"]
    console.print(f"perplexity {scores['perplexity']:.2f} ± {scores['stderr']:.2f}")

    # The model is a normal transformers model whose linear layers stay packed.
    packed, tokenizer = quantine.load(out)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    tokens = packed.generate(**inputs, max_new_tokens=20, do_sample=False)
    console.print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2])
