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
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from llama_cpp_inputs import TEXT, Inputs, arguments_of, held_out
from quantine import Calibration, quantize
from quantine.eval.evaluate import evaluate
from quantine.families.layers import Layer
from quantine.formats.export import export
from quantine.formats.foreign.gguf.target import FILE, GGUFFileTarget
from quantine.formats.foreign.target import Exportable
from quantine.run.target_plan import target_plan
from quantine.source.gguf.parts import read_parts
from quantine.source.locate import locate
from quantine.source.weight_files import float_files, read_config

PROGRAM: Final = str(Path(__file__).with_name("llama_cpp_quantizer.py"))
KEPT: Final = ("perplexity", "stderr", "kl", "kl_stderr", "top1", "recovery")
"""What is written of an evaluation."""


def main() -> None:
    """Make all files, score them, print and write a row for each."""
    arguments = arguments_of(__doc__.splitlines()[0], windows=16).parse_args()
    work, length, count = arguments.work, arguments.window, arguments.windows
    work.mkdir(exist_ok=True)
    files = made(arguments.model, arguments.targets, arguments.samples, work)
    served = served_scores([path for _, _, path in files], length, count, work)
    rows = []
    for (target, by, path), there in zip(files, served, strict=True):
        here = own_scores(path, files[0][2], length, count, work / "predictions")
        rows.append({"target": target, "by": by, **sizes(path), "here": here, "there": there})
        print(json.dumps(rows[-1]), flush=True)
    said = {key: vars(arguments)[key] for key in ("samples", "windows", "window")}
    arguments.json.write_text(json.dumps({**said, "rows": rows}, indent=1) + "\n")


def made(
    model: str, targets: Sequence[str], samples: int, work: Path
) -> list[tuple[str, str, Path]]:
    """The float file, and of every target llama.cpp's and quantine's: target, by whom, path."""
    base, importance = work / "float.gguf", work / "importance.npz"
    if not base.exists():
        float_file(model, base)
    if not importance.exists():
        np.savez(importance, **mean_squares(model, samples))
    files = [("float", "float", base)]
    for target in targets:
        theirs, exported = work / f"{target}.engine.gguf", work / f"{target}.gguf.d"
        if not theirs.exists():
            engine("quantize", str(base), target, str(theirs), str(importance))
        if not exported.exists():
            solve(model, target, samples, work / f"{target}.quantine", exported)
        files += [(target, "llama.cpp", theirs), (target, "quantine", exported / FILE)]
    return files


def served_scores(
    files: Sequence[Path], length: int, count: int, work: Path
) -> list[dict[str, float]]:
    """What llama.cpp finds of each file as it serves it, compared with the first."""
    windows = held_out(locate(files[0]), length, count)
    assert windows.context == 1, "llama.cpp is asked for all tokens but the first"
    asked = work / "windows.json"
    asked.write_text(json.dumps(windows.tokens.tolist()))
    found = json.loads(engine("score", str(asked), *map(str, files)).splitlines()[-1])
    return [{key: one[key] for key in ("perplexity", "divergence")} for one in found]


def own_scores(file: Path, base: Path, length: int, count: int, cache: Path) -> dict[str, float]:
    """What quantine finds of a file, opened as floats, compared with ``base``."""
    found = evaluate(file, TEXT, window=length, limit=count, reference=base, cache=cache)
    (scores,) = found["texts"].values()
    return {key: scores[key] for key in KEPT}


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
    if not out.exists():
        plan = target_plan(model, f"llama.cpp:{target}")
        quantize(model, out, plan, Calibration(TEXT, samples))
    export(out, exported, "gguf")


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
