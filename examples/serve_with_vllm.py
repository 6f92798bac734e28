"""Let vLLM answer several prompts at once with a quantized directory.

python examples/serve_with_vllm.py out

The server is `vllm serve out`; this asks the same engine from Python.
"""

from __future__ import annotations

import importlib.util
import sys

from rich.console import Console

PROMPTS = ["The capital of France is", "Rainbows are", "def square(x):"]


def main(out: str) -> None:
    """Continue `PROMPTS` with the directory ``out``."""
    if importlib.util.find_spec("vllm") is None:
        raise SystemExit("vLLM is not here: install it beside quantine, see docs/engines.md")
    from vllm import LLM, SamplingParams

    # vLLM finds quantine by itself: there is nothing to import, and no flag to set.
    engine = LLM(model=out)
    console = Console(soft_wrap=True)
    for result in engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=20)):
        console.print(result.prompt + result.outputs[0].text, markup=False)


if __name__ == "__main__":  # the engine is a process of its own, which reads this file, too
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
