"""Lets the real vLLM answer prompts with several directories, one after another.

A program of its own, so that an engine's state is its own. Its arguments are two JSON files: the
first has a list of jobs, each with ``directory``, ``options`` of ``LLM``, ``prompts`` (token ids)
and ``tokens`` (how many are wanted). It writes, to the second, for each job ``error`` or for each
prompt ``tokens`` and their ``logprobs``. A job with ``scored`` gets instead the ``logprobs`` of the
prompts' own tokens, from the second on.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

DEFAULTS = {
    "dtype": "float32",
    "max_model_len": 96,
    "enforce_eager": True,
    "distributed_executor_backend": "uni",
    "kv_cache_memory_bytes": 2**27,  # else vLLM wants nearly all memory to be free
    "skip_tokenizer_init": True,
}


def answers(job: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams

    engine = LLM(model=job["directory"], **{**DEFAULTS, **job["options"]})
    if job.get("scored"):
        return scores(engine, job["prompts"])
    wanted = SamplingParams(
        temperature=0, max_tokens=job["tokens"], logprobs=1, ignore_eos=True, detokenize=False
    )
    found = []
    # The second time from the cache of prefixes, where there is one.
    for _ in range(2):
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        found = engine.generate(prompts, wanted, use_tqdm=False)
    return [
        {
            "tokens": list(one.token_ids),
            "logprobs": [
                values[token].logprob
                for values, token in zip(one.logprobs, one.token_ids, strict=True)
            ],
        }
        for one in (result.outputs[0] for result in found)
    ]


def scores(engine: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    wanted = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    results = engine.generate(asked, wanted, use_tqdm=False)
    return [
        {"logprobs": [found[token].logprob for found, token in zip(rows[1:], ids[1:], strict=True)]}
        for ids, rows in zip(prompts, (one.prompt_logprobs for one in results), strict=True)
    ]


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    jobs = json.loads(Path(sys.argv[1]).read_text())
    results: list[dict[str, Any]] = []
    for job in jobs:
        try:
            results.append({"answers": answers(job)})
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # In this process, unless a job has several: an engine then starts in seconds.
    if "--processes" not in sys.argv:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main()
