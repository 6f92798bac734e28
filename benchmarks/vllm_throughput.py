"""Tokens per second of directories in the real vLLM, at several numbers of requests, interleaved.

    .venv-vllm/bin/python benchmarks/vllm_throughput.py FLOAT QUANTIZED [QUANTIZED ...] \\
        --json benchmarks/results/vllm-throughput-demo.json

FLOAT is a Hugging Face directory. All engines are in this process from the beginning; in every
round each answers the same prompts, one after another. What is counted is processor time, of one
thread with OMP_NUM_THREADS=1 and VLLM_CPU_OMP_THREADS_BIND=nobind, so that a machine that does
other things, too, says nearly the same. benchmarks/results.py makes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, Final

REQUESTS: Final = (1, 8, 32)
PROMPT_TOKENS: Final = 4
"""So few that nearly all time is spent on new tokens."""


def main() -> None:
    """Measure, and write what was found after each round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", help="the float one first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, nargs="+", default=REQUESTS)
    parser.add_argument("--dtype", default="bfloat16", help="of activations and of the float model")
    parser.add_argument("--eager", action="store_true", help="without compiled graphs")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    args = parser.parse_args()
    import torch
    from vllm import LLM

    engines = {
        directory: LLM(
            model=directory,
            dtype=args.dtype,
            max_model_len=PROMPT_TOKENS + args.tokens + 1,
            enforce_eager=args.eager,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=2**27,
            skip_tokenizer_init=True,
            distributed_executor_backend="uni",
        )
        for directory in args.directories
    }
    names = [Path(directory).name for directory in engines]
    rows = [
        {"name": name, "requests": requests, "speeds": []}
        for requests in args.requests
        for name in names
    ]
    for number in range(-1, args.rounds):  # the first round warms up
        for row in rows:
            engine = engines[args.directories[names.index(row["name"])]]
            speed = tokens_per_second(engine, row["requests"], args.tokens)
            print(number, row["name"], row["requests"], f"{speed:.2f}", flush=True)
            if number >= 0:
                row["speeds"].append(speed)
        found = {"dtype": args.dtype, "eager": args.eager, "tokens": args.tokens}
        found |= {"threads": torch.get_num_threads(), "rows": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def tokens_per_second(engine: Any, requests: int, tokens: int) -> float:
    """New tokens of all requests per second of processor time, that of prompts included."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    prompts = [
        {
            "prompt_token_ids": [
                (7 * place + 13 * request) % 200 + 20 for place in range(PROMPT_TOKENS)
            ]
        }
        for request in range(requests)
    ]
    started = time.process_time()
    results = engine.generate(prompts, wanted, use_tqdm=False)
    seconds = time.process_time() - started
    return sum(len(result.outputs[0].token_ids) for result in results) / seconds


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all engines in this process
    main()
