"""The Llama architecture and models built like it: separate q, k, v, gate and up projections."""

from quantine.families.family import Family, Link

LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3", "smollm3"),
    blocks="model.layers",
    groups=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    embedding="model.embed_tokens",
    links=(
        Link(
            "R1",
            "gather",
            ("input_layernorm",),
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ),
        Link("R2", "attention", ("self_attn.q_proj", "self_attn.k_proj"), per_head=True),
        Link("R3", "weights", ("self_attn.v_proj",), ("self_attn.o_proj",), per_head=True),
        Link("R4", "gather", ("post_attention_layernorm",), ("mlp.gate_proj", "mlp.up_proj")),
        Link("R5", "weights", ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
    ),
    final_norm="model.norm",
    untouched=("self_attn.q_norm", "self_attn.k_norm"),
)
"""The family of Llama, Mistral, Qwen 2 and 3, and SmolLM3 models."""
