"""Llama and the models built like it: separate q, k, v and gate, up projections."""

from quantine.families.base import Family

LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text"),
    blocks="model.layers",
    groups=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    embedding="model.embed_tokens",
)
