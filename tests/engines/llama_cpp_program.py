"""Run by llama-cpp-python's own Python: perplexity of windows of tokens, and tokens of texts."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    import numpy as np
    from llama_cpp import Llama

    file, asked = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    longest = max(map(len, asked["windows"]))
    model = Llama(file, n_ctx=longest, n_batch=longest, logits_all=True, verbose=False)
    total, count = 0.0, 0
    for window in asked["windows"]:
        model.reset()
        model.eval(window)
        logits = np.array(model.scores[: len(window)], dtype=np.float64)
        top = logits.max(1, keepdims=True)
        logits -= top + np.log(np.exp(logits - top).sum(1, keepdims=True))
        total -= logits[np.arange(len(window) - 1), window[1:]].sum()
        count += len(window) - 1
    texts = [model.tokenize(text.encode(), add_bos=False, special=False) for text in asked["texts"]]
    print(json.dumps({"perplexity": float(np.exp(total / count)), "texts": texts}))


if __name__ == "__main__":
    main()
