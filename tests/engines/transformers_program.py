"""Run by a Python without quantine: perplexity of windows of tokens by transformers alone."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    windows = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=sys.argv[3]).eval()
    total, count = 0.0, 0
    for window in windows:
        with torch.no_grad():
            predicted = model(torch.tensor([window])).logits[0, :-1].double().log_softmax(-1)
        total -= float(predicted.gather(1, torch.tensor(window[1:])[:, None]).sum())
        count += len(window) - 1
    print(json.dumps({"perplexity": math.exp(total / count)}))


if __name__ == "__main__":
    main()
