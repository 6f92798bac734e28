"""Small quantized directories that the real vLLM can serve, and what quantine itself answers.

vLLM's attention on the CPU has no heads of 16 channels, so these are wider than `tiny_models`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

import quantine
from quantine import Calibration, Plan, quantize
from tiny_models import FAMILIES, build, matrices_of, mixed_rules, tiny_config

WIDTH: Final = 128
TOKENS: Final = 12
"""Number of tokens that are wanted."""
LENGTHS: Final = (1, 3, 17, 40, 41)
"""Numbers of tokens of the prompts."""

SERVED: Final = (
    "llama",
    "llama_tied",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "phi3",
    "gemma2",
    "gemma3",
    "opt",
    "opt_projected",
    "falcon_old",
    "falcon_new",
    "falcon_alibi",
    "gpt2",
)
"""Variants of `tiny_models.FAMILIES` that vLLM serves."""

HEAD: Final = {"match": "@head", "method": "rtn", "bits": 8, "group_size": 32}
TABLE: Final = {"match": "@embedding", "method": "rtn", "bits": 6, "group_size": 16}
SPQR: Final = {
    "match": "@blocks",
    "method": "spqr",
    "bits": 3,
    "group_size": 16,
    "stat_group_size": 16,
    "scale_bits": 3,
    "zero_bits": 3,
    "outliers": 0.02,
}
ADADIM: Final = {"match": "@blocks", "method": "adadim", "inner": "gptq", "bits": 3}
CLUSTERS: Final = [8, 2, 2, 8, 8]
RPTQ: Final = {"norm": 8, "attention": 8, "hidden": 8, "clusters": CLUSTERS}
PLANS: Final[dict[str, dict[str, Any]]] = {
    "spqr": {"rules": [SPQR]},
    "all": {"rules": [SPQR, TABLE, HEAD]},
    "adadim": {
        "rules": [
            {"match": "*.down_proj", "method": "rtn", "bits": 4, "group_axis": "out"},
            {"match": "*.v_proj", "method": "keep"},
            {**ADADIM, "group_size": 32},
            HEAD,
        ]
    },
    "split": {  # that can be cut in two, along both axes
        "rules": [
            {"match": "*.mlp.*", "method": "rtn", "bits": 5, "group_size": 16},
            SPQR,
            TABLE,
            HEAD,
        ]
    },
    "rptq": {
        "rules": [{"match": "@blocks", "method": "gptq", "bits": 4, "group_size": 32}],
        "activations": RPTQ,
    },
    "clusters": {
        "rules": [{"match": "@blocks", "method": "rtn", "bits": 4, "group_size": 0}],
        "activations": {**RPTQ, "norm": 4, "token_factors": False},
    },
    "token": {
        "rules": [{"match": "@blocks", "method": "rtn", "bits": 4, "group_size": 32}],
        "activations": {**RPTQ, "granularity": "token"},
    },
    "floats": {  # only activations are rounded
        "rules": [{"match": "@blocks", "method": "keep"}],
        "activations": RPTQ,
    },
    "bloom": {
        "rules": [
            {"match": "*.query_key_value", "method": "keep"},
            {"match": "@blocks", "method": "rtn", "bits": 3, "group_size": 32},
        ]
    },
    "keys": {
        "rules": [{"match": "@blocks", "method": "rtn", "bits": 4, "group_size": 32}],
        "activations": {**RPTQ, "key": 4, "value": 4},
    },
}
"""Plans by name; `mixed` is another, in which every matrix has its own scheme."""


class Directories:
    """Makes float and quantized directories below ``root``, each at first use.

    Args:
        root: a directory of their own.
        calibration: of plans that need one.
    """

    def __init__(self, root: Path, calibration: Calibration) -> None:
        self._root = root
        self._calibration = calibration

    def quantized(self, family: str, plan: str) -> Path:
        """The directory of a model of ``family`` in `FAMILIES`, quantized by ``plan``."""
        path = self._root / f"{family}-{plan}"
        if not path.exists():
            values = self._rules(family) if plan == "mixed" else PLANS[plan]
            made = Plan.from_dict({**values, "arithmetic": "exact"})
            quantize(self.floats(family), path, made, self._calibration)
        return path

    def _rules(self, family: str) -> dict[str, Any]:
        layers = matrices_of(self.floats(family))
        return {"rules": mixed_rules(layers, groups="refit", clip="minmax")}

    def floats(self, family: str) -> Path:
        """The directory of the float model of ``family``."""
        path = self._root / family
        if not path.exists():
            build(tiny_config(family, **_wide(family)), path)
        return path


def _wide(family: str) -> dict[str, int]:
    values = FAMILIES[family][1]
    changes = {"n_embd" if "n_embd" in values else "hidden_size": WIDTH}
    if values.get("word_embed_proj_dim") == values.get("hidden_size"):
        changes["word_embed_proj_dim"] = WIDTH
    if "head_dim" in values:
        changes["head_dim"] = WIDTH // values["num_attention_heads"]
    return changes


def prompts() -> list[list[int]]:
    """Token ids of several prompts; the last two begin alike."""
    generator = torch.Generator().manual_seed(1)
    found = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in LENGTHS]
    found[-1][:32] = found[-2][:32]
    return found


@torch.no_grad()
def own_answers(directory: Path, count: int = TOKENS) -> list[tuple[list[int], list[float]]]:
    """What quantine answers to `prompts`: greedy tokens, and their logarithmic probabilities."""
    model, _ = quantine.load(directory, dtype="float32")
    found = []
    for prompt in prompts():
        tokens, logprobs = torch.tensor([prompt]), []
        for _ in range(count):
            last = model(input_ids=tokens).logits[0, -1].log_softmax(-1)
            logprobs.append(float(last.max()))
            tokens = torch.cat([tokens, last.argmax().view(1, 1)], 1)
        found.append((tokens[0, len(prompt) :].tolist(), logprobs))
    return found
