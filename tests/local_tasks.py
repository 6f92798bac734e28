"""Definitions of lm-eval tasks that read files beside them, as a user would write them."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

WORDS = ("stone", "river", "lamp", "cloud", "apple", "chair", "tiger", "glass")
QUESTIONS = 12


def write_tasks(directory: Path) -> Path:
    """Two tasks with choices, a group of both, one of texts, and one whose answers are programs.

    Returns:
        The directory, for ``--task-path``.
    """
    directory.mkdir()
    for number, name in enumerate(("tiny_odd", "tiny_even")):
        rows = [
            {
                "question": f"{WORDS[(n * 3 + number) % 8]} {n}:",
                "choices": [WORDS[n % 8], WORDS[(n * 5 + 1) % 8] + " two"],
                "answer": (n * 7 + number) % 3 % 2,
            }
            for n in range(QUESTIONS)
        ]
        _write(directory, name, rows, _choices())
    group = {
        "group": "tiny_group",
        "task": ["tiny_odd", "tiny_even"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (directory / "tiny_group.yaml").write_text(yaml.safe_dump(group))
    texts = [{"text": " ".join(WORDS[n % 5 :] * (n % 3 + 1))} for n in range(QUESTIONS)]
    _write(directory, "tiny_text", texts, _perplexity())
    programs = [
        {"prompt": f"x = {n}\n", "test": "assert x == 1", "entry_point": "x"} for n in range(4)
    ]
    _write(directory, "tiny_code", programs, _program())
    # lm-eval joins prompt and answer only by a function beside the definition.
    (directory / "programs.py").write_text(
        "def build(resps, docs):\n"
        "    return [[doc['prompt'] + '#' + r.replace(chr(10), ' ') for r in resp]\n"
        "            for resp, doc in zip(resps, docs)]\n"
    )
    return directory


def _choices() -> dict[str, object]:
    metrics = ("acc", "acc_norm")
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
    }


def _perplexity() -> dict[str, object]:
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    }


def _program() -> dict[str, object]:
    return {
        "unsafe_code": True,
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{test}}",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "filter_list": [
            {"name": "build", "filter": [{"function": "custom", "filter_fn": "FUNCTION"}]}
        ],
    }


def _write(
    directory: Path, name: str, rows: list[dict[str, object]], task: dict[str, object]
) -> None:
    data = directory / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    definition = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(directory / "cache"),
        },
        "test_split": "test",
        **task,
    }
    text = yaml.safe_dump(definition, sort_keys=False)
    text = text.replace("filter_fn: FUNCTION", "filter_fn: !function programs.build")
    (directory / f"{name}.yaml").write_text(text)
