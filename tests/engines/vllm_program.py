"""Run by vLLM's own Python: perplexity of windows of tokens, and greedy continuations, as JSON."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams

    directory, windows = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    longest = max(map(len, windows)) + 16
    engine = LLM(
        directory,
        dtype=sys.argv[3],
        enforce_eager=True,
        max_model_len=longest,
        distributed_executor_backend="uni",
    )
    prompts = [{"prompt_token_ids": window} for window in windows]
    scored = engine.generate(
        prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
    )
    total, count = 0.0, 0
    for window, output in zip(windows, scored, strict=True):
        for token, found in zip(window[1:], output.prompt_logprobs[1:], strict=True):
            total -= found[token].logprob
            count += 1
    begun = [{"prompt_token_ids": window[:16]} for window in windows]
    greedy = engine.generate(begun, SamplingParams(max_tokens=16, temperature=0.0), use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in greedy]
    print(json.dumps({"perplexity": math.exp(total / count), "tokens": tokens}))


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: it starts in seconds
    main()
