"""Files that comparisons with llama.cpp are made of, and what quantine finds of each."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from llama_cpp_inputs import TEXT, Inputs
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


def python_of_llama_cpp() -> str:
    """The Python that has llama-cpp-python, see docs/engines.md."""
    return os.environ["QUANTINE_LLAMA_CPP_PYTHON"]


def float_and_importance(
    model: str, samples: int, work: Path, text: str = TEXT
) -> tuple[Path, Path]:
    """The float weights as a GGUF file and the importance matrix, made where they are missing."""
    base, importance = work / "float.gguf", work / "importance.npz"
    if not base.exists():
        float_file(model, base)
    if not importance.exists():
        np.savez(importance, **mean_squares(model, samples, text))
    return base, importance


def quantized_by_engine(base: Path, importance: Path, target: str, work: Path) -> Path:
    """The file of type ``target`` that llama.cpp's quantizer makes, unless it is there."""
    theirs = work / f"{target}.engine.gguf"
    if not theirs.exists():
        engine("quantize", str(base), target, str(theirs), str(importance))
    return theirs


def own_scores(file: Path, base: Path, length: int, count: int, cache: Path) -> dict[str, float]:
    """What quantine finds of a file, opened as floats, compared with ``base``."""
    found = evaluate(file, TEXT, window=length, limit=count, reference=base, cache=cache)
    (scores,) = found["texts"].values()
    return {key: scores[key] for key in KEPT}


def engine(*arguments: str) -> str:
    """What llama.cpp's program prints."""
    command = [python_of_llama_cpp(), PROGRAM, *arguments]
    clean = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=clean)
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


def mean_squares(model: str, samples: int, text: str = TEXT) -> dict[str, Any]:
    """The mean square of each input of every matrix in the blocks, by llama.cpp's names."""
    inputs = Inputs.of(model, torch.float32)
    segments = inputs.calibration(samples, text)
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


def nbytes(directory: Path) -> int:
    """Bytes of the weights of a directory."""
    return sum(file.stat().st_size for file in float_files(directory))
