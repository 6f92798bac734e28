"""Files solved in llama.cpp's own types against those that its quantizer makes, at equal bytes.

    QUANTINE_LLAMA_CPP_PYTHON=... python benchmarks/against_llama_cpp.py demo OUT.json --work DIR

Both start from the same float weights and the same calibration text: of it, llama.cpp's quantizer
gets the mean square of each input (its importance matrix), quantine the same and how inputs move
together. Both files are scored by llama.cpp, as it serves them: perplexity on held-out text, and
the mean divergence of its predictions from those of the float model. Files that are already in
DIR are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from quantine.calibrate.segments import Calibration, calibration_segments
from quantine.calibrate.text import read_text
from quantine.families import family_of
from quantine.families.layers import find_layers
from quantine.source.gguf.parts import read_parts
from quantine.source.gguf.weights import model_names
from quantine.source.locate import locate

PROGRAM: Final = str(Path(__file__).with_name("llama_cpp_quantizer.py"))
TARGETS: Final = ("Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K")


def main() -> None:
    """Make all files, score them at once, print and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("json", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(exist_ok=True)
    calibration = Calibration(samples=arguments.samples)
    base, importance = work / "float.gguf", work / "importance.npz"
    if not base.exists():
        float_file(arguments.model, base)
    if not importance.exists():
        np.savez(importance, **mean_squares(arguments.model, calibration))
    files = [base]
    for target in arguments.targets:
        theirs, ours = work / f"{target}.engine.gguf", work / f"{target}.quantine"
        if not theirs.exists():
            engine("quantize", str(base), target, str(theirs), str(importance))
        if not ours.with_suffix(".gguf.d").exists():
            solve(arguments.model, target, calibration, ours)
        files += [theirs, ours.with_suffix(".gguf.d") / "model.gguf"]
    windows = work / "windows.json"
    windows.write_text(json.dumps(held_out(arguments.model, arguments.window, arguments.windows)))
    scores = json.loads(engine("score", str(windows), *map(str, files)).splitlines()[-1])
    rows = [row(file, score) for file, score in zip(files, scores, strict=True)]
    for one in rows:
        print(*one.values())
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
    """The float weights as a GGUF file, by llama.cpp; ``model`` is a GGUF file itself."""
    engine("decode", str(locate(model).gguf_parts[0].path), str(out))


def solve(model: str, target: str, calibration: Calibration, out: Path) -> None:
    """Quantize for ``target``, and export."""
    quantine = [sys.executable, "-m", "quantine.cli"]
    samples = ["--samples", str(calibration.samples), "--quiet"]
    asked = ["--target", f"llama.cpp:{target}", *samples]
    subprocess.run([*quantine, "quantize", model, str(out), *asked], check=True)
    exported = str(out.with_suffix(".gguf.d"))
    subprocess.run([*quantine, "export", str(out), exported, "--to", "gguf"], check=True)


@torch.no_grad()
def mean_squares(model: str, calibration: Calibration) -> dict[str, Any]:
    """The mean square of each input of every matrix in the blocks, by llama.cpp's names."""
    source = locate(model)
    config = source.config()
    text = config.get_text_config()
    segments = calibration_segments(
        calibration, source.tokenizer(), text.vocab_size, text.max_position_embeddings
    )
    loaded = source.float_model(torch.float32)
    stored = {
        name: gguf
        for gguf, name in model_names(
            source.gguf_parts[0].metadata["general.architecture"], loaded
        ).items()
    }
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str, x: torch.Tensor) -> None:
        square = x.flatten(0, -2).double().square().sum(0)
        sums[name] = sums.get(name, 0) + square

    for layer in find_layers(loaded, family_of(config)):
        if layer.role == "block":
            name = stored[f"{layer.name}.weight"]
            layer.observe(loaded, lambda x, name=name: watch(name, x))
    for segment in segments:
        loaded(segment.unsqueeze(0))
    return {name: (total / segments.numel()).float().numpy() for name, total in sums.items()}


def held_out(model: str, length: int, count: int) -> list[list[int]]:
    """The first windows of the held-out text."""
    tokenizer = locate(model).tokenizer()
    ids = tokenizer(read_text("builtin", "heldout"), add_special_tokens=False)["input_ids"]
    return [ids[start : start + length] for start in range(0, length * count, length)]


def row(file: Path, score: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: name, bytes of tensors, scores."""
    nbytes = sum(tensor.nbytes for part in read_parts(file) for tensor in part.tensors)
    name = file.parent.name if file.name == "model.gguf" else file.name
    return {
        "name": name,
        "tensor_bytes": nbytes,
        "perplexity": round(score["perplexity"], 4),
        "divergence": round(score["divergence"], 5),
    }


if __name__ == "__main__":
    main()
