"""Quantize a model such that llama.cpp runs the very same weights, and let it speak there.

python examples/export_to_llama_cpp.py demo out out-gguf

The last part needs llama-cpp-python; without it, the command for llama.cpp's own program is shown.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from rich.console import Console

import quantine
from quantine.formats.export import export

PROMPT = "The capital of France is"


def main(model: str, out: str, target: str) -> None:
    """Quantize ``model`` into ``out``, and write that into ``target`` for llama.cpp."""
    console = Console(soft_wrap=True)

    # Symmetric groups of 32 in 4 bits are llama.cpp's Q4_0. `static` fits them before errors are
    # fed back, so that columns stay in their order, which GGUF files demand. `quantine plan MODEL
    # --target gguf` tells for any plan whether it fits.
    plan = quantine.Plan.preset("gptq", bits=4, group_size=32, sym=True, groups="static")
    quantine.quantize(model, out, plan, quantine.Calibration("builtin", samples=32))

    exported = export(out, target, "gguf")
    file = Path(exported.path) / "model.gguf"
    for note in exported.notes:
        console.print(f"note: {note}")
    console.print(f"{file}, {exported.nbytes / 1e6:.1f} MB, with the same weights")

    if importlib.util.find_spec("llama_cpp") is None:
        console.print(f'llama-cpp-python is not here: llama-cli -m {file} -p "{PROMPT}"')
        return
    from llama_cpp import Llama

    engine = Llama(str(file), n_ctx=64, verbose=False)
    answer = engine(PROMPT, max_tokens=20, temperature=0)
    console.print(PROMPT + answer["choices"][0]["text"])


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
