"""Run by llama-cpp-python's own Python: perplexity of windows, tokens of texts, ends of answers."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    import llama_cpp
    import numpy as np

    file, asked = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    longest = max(map(len, asked["windows"]))
    if "decoded" in sys.argv[3:]:
        file = decoded(llama_cpp, file)
    model = llama_cpp.Llama(file, n_ctx=longest, n_batch=longest, logits_all=True, verbose=False)
    total, count = 0.0, 0
    for window in asked["windows"]:
        model.reset()
        model.eval(window)
        logits = np.array(model.scores[: len(window)], dtype=np.float64)
        top = logits.max(1, keepdims=True)
        logits -= top + np.log(np.exp(logits - top).sum(1, keepdims=True))
        total -= logits[np.arange(len(window) - 1), window[1:]].sum()
        count += len(window) - 1
    special, begun = "special" in sys.argv[3:], "begun" in sys.argv[3:]
    texts = [
        model.tokenize(text.encode(), add_bos=begun, special=special) for text in asked["texts"]
    ]
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    words = range(llama_cpp.llama_vocab_n_tokens(vocabulary))
    ends = [token for token in words if llama_cpp.llama_vocab_is_eog(vocabulary, token)]
    print(json.dumps({"perplexity": float(np.exp(total / count)), "texts": texts, "ends": ends}))


def decoded(llama_cpp: Any, file: str) -> str:
    """The same model with its matrices decoded to float32, by the engine itself."""
    out = f"{file}.f32"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize, options.nthread = 0, True, 1
    status = llama_cpp.llama_model_quantize(file.encode(), out.encode(), ctypes.byref(options))
    if status:
        raise RuntimeError(f"llama.cpp does not decode {file}: {status}")
    return out


if __name__ == "__main__":
    main()
