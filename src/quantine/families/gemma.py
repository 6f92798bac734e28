"""Gemma 2 and 3: llama with a norm after attention and the MLP, too."""

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
