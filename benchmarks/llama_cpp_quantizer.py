"""Run by llama-cpp-python's own Python: its quantizer, and scores of GGUF files.

    python llama_cpp_quantizer.py decode FILE.gguf OUT.gguf
    python llama_cpp_quantizer.py quantize FLOAT.gguf TYPE OUT.gguf [IMPORTANCE.npz]
    python llama_cpp_quantizer.py score WINDOWS.json FLOAT.gguf FILE.gguf ...

Importance is the mean square of each input, by the name of its tensor.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

FILE_TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11,
    "Q3_K_M": 12, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18,
    "IQ3_XS": 22, "IQ4_XS": 30,
}  # fmt: skip
"""What llama.cpp calls a file of each type and mixture."""


def quantize(source: str, kind: str, out: str, importance: str | None = None) -> None:
    """Quantize ``source`` by llama.cpp, on one thread."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = FILE_TYPES[kind], 1
    kept: list[Any] = []
    if importance is not None:
        values = dict(np.load(importance))
        entries = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
        for entry, (name, value) in zip(entries, values.items(), strict=False):
            data = np.ascontiguousarray(value, dtype=np.float32)
            kept += [data, name.encode()]
            entry.name = kept[-1]
            entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = data.size
        options.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
        kept.append(entries)
    status = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(options))
    if status:
        raise SystemExit(f"llama.cpp does not quantize {source}: {status}")


def decode(source: str, out: str) -> None:
    """The same model in float32."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize, options.nthread = 0, True, 1
    status = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(options))
    if status:
        raise SystemExit(f"llama.cpp does not decode {source}: {status}")


def score(windows: str, *files: str) -> None:
    """Print the perplexity of each file, and its mean divergence from the first, as JSON."""
    asked = json.loads(Path(windows).read_text(encoding="utf-8"))
    length = max(map(len, asked))
    models = [
        llama_cpp.Llama(
            file, n_ctx=length, n_batch=length, n_threads=1, n_threads_batch=1, logits_all=True,
            verbose=False,
        )
        for file in files
    ]  # fmt: skip
    loss, divergence, count = np.zeros(len(files)), np.zeros(len(files)), 0
    for window in asked:
        expected = None
        for number, model in enumerate(models):
            model.reset()
            model.eval(window)
            found = log_shares(np.array(model.scores[: len(window) - 1], dtype=np.float64))
            expected = found if expected is None else expected
            loss[number] -= found[np.arange(len(window) - 1), window[1:]].sum()
            divergence[number] += (np.exp(expected) * (expected - found)).sum()
        count += len(window) - 1
    rows = [
        {"file": file, "perplexity": float(np.exp(a / count)), "divergence": float(b / count)}
        for file, a, b in zip(files, loss, divergence, strict=True)
    ]
    print(json.dumps(rows))


def log_shares(logits: Any) -> Any:
    """The logarithm of the softmax over the last dimension."""
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


if __name__ == "__main__":
    {"decode": decode, "quantize": quantize, "score": score}[sys.argv[1]](*sys.argv[2:])
