"""Files solved in llama.cpp's own types against those that its quantizer makes, at equal bytes.

    QUANTINE_LLAMA_CPP_PYTHON=... python benchmarks/against_llama_cpp.py demo OUT.json --work DIR

Both start from the same float weights and the same calibration text: of it, llama.cpp's quantizer
gets the mean square of each input (its importance matrix), quantine the same and how inputs move
together. Both files are opened here, as floats, and scored by one evaluation: perplexity on
held-out text, and the mean divergence of predictions from those of the float model. llama.cpp
scores them, too, as it serves them. Files that are already in DIR are not made again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from llama_cpp_inputs import TEXT, Inputs, arguments_of, held_out
from quantine.eval.evaluate import evaluate
from quantine.families.layers import Layer
from quantine.formats.foreign.gguf.target import FILE, GGUFFileTarget
from quantine.formats.foreign.target import Exportable
from quantine.source.gguf.parts import read_parts
from quantine.source.locate import locate
from quantine.source.weight_files import float_files, read_config

PROGRAM: Final = str(Path(__file__).with_name("llama_cpp_quantizer.py"))
KEPT: Final = ("perplexity", "stderr", "kl", "kl_stderr", "top1", "recovery")
"""What is written of an evaluation."""


def main() -> None:
    """Make all files, score them, print and write a row for each."""
    arguments = arguments_of(__doc__.splitlines()[0], windows=16).parse_args()
    work = arguments.work
    work.mkdir(exist_ok=True)
    base, importance = work / "float.gguf", work / "importance.npz"
    if not base.exists():
        float_file(arguments.model, base)
    if not importance.exists():
        np.savez(importance, **mean_squares(arguments.model, arguments.samples))
    files = [("float", "float", base)]
    for target in arguments.targets:
        theirs, ours = work / f"{target}.engine.gguf", work / f"{target}.quantine"
        exported = work / f"{target}.gguf.d" / FILE
        if not theirs.exists():
            engine("quantize", str(base), target, str(theirs), str(importance))
        if not exported.exists():
            solve(arguments.model, target, arguments.samples, ours, exported.parent)
        files += [(target, "llama.cpp", theirs), (target, "quantine", exported)]
    windows = held_out(locate(base), arguments.window, arguments.windows)
    assert windows.context == 1, "llama.cpp is asked for all tokens but the first"
    asked = work / "windows.json"
    asked.write_text(json.dumps(windows.tokens.tolist()))
    paths = [str(path) for _, _, path in files]
    served = json.loads(engine("score", str(asked), *paths).splitlines()[-1])
    rows = []
    for (target, by, path), there in zip(files, served, strict=True):
        result = evaluate(
            path, TEXT, window=arguments.window, limit=arguments.windows, reference=base,
            cache=work / "predictions",
        )  # fmt: skip
        (found,) = result["texts"].values()
        here = {key: found[key] for key in KEPT}
        rows.append({"target": target, "by": by, **sizes(path), "here": here, "there": there})
        print(json.dumps(rows[-1]), flush=True)
    said = {key: vars(arguments)[key] for key in ("model", "samples", "windows", "window")}
    arguments.json.write_text(json.dumps({**said, "rows": rows}, indent=1) + "\n")


def engine(*arguments: str) -> str:
    """What llama.cpp's program prints."""
    python = os.environ["QUANTINE_LLAMA_CPP_PYTHON"]
    clean = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [python, PROGRAM, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=clean
    )
    return done.stdout


def float_file(model: str, out: Path) -> None:
    """The float weights as a GGUF file: decoded by llama.cpp, or written by quantine."""
    source = locate(model)
    if source.gguf_file is not None:
        engine("decode", str(source.gguf_parts[0].path), str(out))
        return
    tensors: dict[str, Tensor] = {}
    for file in float_files(source.directory):
        tensors |= load_file(file)
    config = source.config()
    written = Exportable(
        directory=source.directory,
        config=config,
        settings=read_config(source.directory),
        model=source.bare_model(config),
        matrices={},
        floats=list(tensors),
        kept_linears=[],
        read=lambda name: tensors[name],
        read_float=lambda name: tensors[name].float(),
    )
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        GGUFFileTarget().write(written, Path(scratch))
        (Path(scratch) / FILE).rename(out)


def solve(model: str, target: str, samples: int, out: Path, exported: Path) -> None:
    """Quantize for ``target``, and export."""
    asked = ["--target", f"llama.cpp:{target}", "--samples", str(samples), "--quiet"]
    if not out.exists():
        quantine("quantize", model, str(out), *asked)
    quantine("export", str(out), str(exported), "--to", "gguf")


def quantine(*arguments: str) -> None:
    """Run the program ``quantine``."""
    subprocess.run([sys.executable, "-m", "quantine.cli", *arguments], check=True)


def mean_squares(model: str, samples: int) -> dict[str, Any]:
    """The mean square of each input of every matrix in the blocks, by llama.cpp's names."""
    inputs = Inputs.of(model, torch.float32)
    segments = inputs.calibration(samples)
    sums: dict[str, Tensor] = {}

    def watch(layer: Layer, x: Tensor) -> None:
        name = inputs.stored[layer.stored_name]
        sums[name] = sums.get(name, 0) + x.double().square().sum(0)

    inputs.observe(segments, watch)
    return {name: (total / segments.numel()).float().numpy() for name, total in sums.items()}


def sizes(file: Path) -> dict[str, int]:
    """Bytes of a file, and of the tensors in it."""
    tensors = sum(tensor.nbytes for part in read_parts(file) for tensor in part.tensors)
    return {"file_bytes": file.stat().st_size, "tensor_bytes": tensors}


if __name__ == "__main__":
    main()
