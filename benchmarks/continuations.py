"""How often a quantized model goes on with a text as the float model does, by greedy decoding.

    python benchmarks/continuations.py MODEL OUT... --prompts humaneval_test.jsonl --json FILE

Prompts are the field ``prompt`` of each line of a .jsonl file. Both models write as many tokens as
asked for, each the likeliest; end tokens stop neither. Of OUT the report is the share of prompts
whose tokens are all those of the float model, and the mean number before the first that differs.
The float model runs in float32, the quantized ones as they generate for users.
"""

from __future__ import annotations

import argparse
import json
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import torch

import quantine
from quantine.runtime.load import load_model
from quantine.source.locate import locate

AT_ONCE: Final = 8
"""Prompts that the float model goes on with at once."""


def main() -> None:
    """Print and store a row for each directory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the float model, as quantine's commands take it")
    parser.add_argument("outs", nargs="+", type=Path, metavar="OUT")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE")
    parser.add_argument("--limit", type=int, help="number of prompts; default all")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    asked = parser.parse_args()
    lines = asked.prompts.read_text(encoding="utf-8").splitlines()[: asked.limit]
    prompts = [json.loads(line)["prompt"] for line in lines]
    expected = float_continuations(asked.model, prompts, asked.tokens)
    rows = []
    for out in asked.outs:
        found = quantized_continuations(out, prompts, asked.tokens)
        agreed = [agreement(*pair) for pair in zip(found, expected, strict=True)]
        rows.append(
            {
                "plan": out.name,
                "bits_per_weight": bits_per_weight(out),
                "prompts": len(prompts),
                "tokens": asked.tokens,
                "same": sum(number == asked.tokens for number in agreed) / len(agreed),
                "tokens_before_a_difference": sum(agreed) / len(agreed),
            }
        )
        print(rows[-1], flush=True)
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def float_continuations(name: str, prompts: list[str], tokens: int) -> list[list[int]]:
    """The tokens with which the float model goes on with each prompt."""
    source = locate(name)
    model, tokenizer = load_model(source, torch.float32), source.tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    found: list[list[int]] = []
    for start in range(0, len(prompts), AT_ONCE):
        inputs = tokenizer(prompts[start : start + AT_ONCE], return_tensors="pt", padding=True)
        found += continued(model, inputs, tokens)
    return found


def quantized_continuations(out: Path, prompts: list[str], tokens: int) -> list[list[int]]:
    """The tokens with which a quantized model goes on with each prompt, one after another."""
    model, tokenizer = quantine.load(out)
    found: list[list[int]] = []
    for prompt in prompts:
        found += continued(model, tokenizer(prompt, return_tensors="pt"), tokens)
    return found


@torch.no_grad()
def continued(model: Any, inputs: Any, tokens: int) -> list[list[int]]:
    """The tokens that follow each of ``inputs``, each the likeliest."""
    length = inputs["input_ids"].shape[1]
    whole = model.generate(
        **inputs,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        pad_token_id=model.config.eos_token_id,
    )
    continuations: list[list[int]] = whole[:, length:].tolist()
    return continuations


def agreement(found: list[int], expected: list[int]) -> int:
    """Number of tokens before the first that differs."""
    pairs = zip(found, expected, strict=True)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def bits_per_weight(out: Path) -> float:
    """Of the quantized matrices of a directory."""
    report = json.loads((out / "quantine_report.json").read_text(encoding="utf-8"))
    return float(report["totals"]["bits_per_weight"])


if __name__ == "__main__":
    main()
