"""The Phi-3 architecture: llama with q, k, v in one matrix, and gate and up in another."""

from quantine.families.family import Family, Link

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
    links=(
        Link("R1", "gather", ("input_layernorm",), ("self_attn.qkv_proj",)),
        Link("R2", "attention", ("self_attn.qkv_proj",), per_head=True),
        Link(
            "R3",
            "weights",
            ("self_attn.qkv_proj",),
            ("self_attn.o_proj",),
            per_head=True,
            rows="last",
        ),
        Link("R4", "gather", ("post_attention_layernorm",), ("mlp.gate_up_proj",)),
        Link("R5", "weights", ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    ),
    final_norm="model.norm",
)
"""The family of Phi-3 models."""
