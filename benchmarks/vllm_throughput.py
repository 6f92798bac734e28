"""Tokens per second of directories in the real vLLM, at several numbers of requests, interleaved.

    .venv-vllm/bin/python benchmarks/vllm_throughput.py FLOAT QUANTIZED [QUANTIZED ...]

FLOAT is a Hugging Face directory. All engines are there from the beginning; in every round each
answers the same prompts, so that what else the machine does hits all alike. Printed are medians
over rounds, as a table and as JSON in the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, Final

REQUESTS: Final = (1, 8, 32)
PROMPT_TOKENS: Final = 32


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", help="the float one first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, nargs="+", default=REQUESTS)
    parser.add_argument("--dtype", default="bfloat16", help="of activations and of the float model")
    parser.add_argument("--eager", action="store_true", help="without compiled graphs")
    args = parser.parse_args()
    from vllm import LLM

    engines = {
        directory: LLM(
            model=directory,
            dtype=args.dtype,
            max_model_len=PROMPT_TOKENS + args.tokens + 1,
            enforce_eager=args.eager,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=2**30,
            skip_tokenizer_init=True,
        )
        for directory in args.directories
    }
    found: dict[tuple[str, int], list[float]] = {}
    for number in range(-1, args.rounds):  # the first round warms up
        for requests in args.requests:
            for directory, engine in engines.items():
                speed = tokens_per_second(engine, requests, args.tokens)
                if number >= 0:
                    found.setdefault((directory, requests), []).append(speed)
    print_table(found, args.requests)


def tokens_per_second(engine: Any, requests: int, tokens: int) -> float:
    """New tokens per second of all requests together, prompts included in the time."""
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
    started = time.perf_counter()
    results = engine.generate(prompts, wanted, use_tqdm=False)
    seconds = time.perf_counter() - started
    return sum(len(result.outputs[0].token_ids) for result in results) / seconds


def print_table(found: dict[tuple[str, int], list[float]], requests: tuple[int, ...]) -> None:
    """Medians, and how each compares with the first directory."""
    medians = {key: statistics.median(speeds) for key, speeds in found.items()}
    names = list(dict.fromkeys(directory for directory, _ in medians))
    print("| directory | " + " | ".join(f"{count} requests" for count in requests) + " |")
    print("|---" * (len(requests) + 1) + "|")
    for name in names:
        cells = [
            f"{medians[name, count]:.1f} ({medians[name, count] / medians[names[0], count]:.2f})"
            for count in requests
        ]
        print(f"| {Path(name).name} | " + " | ".join(cells) + " |")
    print(json.dumps([[*key, speeds] for key, speeds in found.items()]))


if __name__ == "__main__":
    main()
