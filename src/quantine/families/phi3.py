"""Phi-3: llama with q, k, v in one matrix and gate, up in another."""

from quantine.families.base import Family

PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    blocks="model.layers",
    groups=(
        ("self_attn.qkv_proj",),
        ("self_attn.o_proj",),
        ("mlp.gate_up_proj",),
        ("mlp.down_proj",),
    ),
    embedding="model.embed_tokens",
)
