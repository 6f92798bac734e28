"""The Gemma 2 and 3 architectures: llama with further norms after attention and after the MLP."""

from dataclasses import replace

from quantine.families.llama import LLAMA

GEMMA = replace(
    LLAMA,
    name="gemma",
    model_types=("gemma2", "gemma3_text"),
    links=tuple(
        replace(link, producers=("pre_feedforward_layernorm",)) if link.kind == "R4" else link
        for link in LLAMA.links
    ),
)
"""The family of Gemma 2 and 3 models."""
