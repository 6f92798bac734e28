"""The GPT-NeoX architecture, also that of Pythia.

Attention and MLP may run in parallel; the groups are right either way.
"""

from quantine.families.family import Family, Link

GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    blocks="gpt_neox.layers",
    groups=(
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
    embedding="gpt_neox.embed_in",
    links=(
        Link("R1", "gather", ("input_layernorm",), ("attention.query_key_value",)),
        Link("R2", "attention", ("attention.query_key_value",), per_head=True),
        Link(
            "R3",
            "weights",
            ("attention.query_key_value",),
            ("attention.dense",),
            per_head=True,
            rows="interleaved",
        ),
        Link("R4", "gather", ("post_attention_layernorm",), ("mlp.dense_h_to_4h",)),
        Link("R5", "weights", ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)),
    ),
    attention="attention",
    key_heads="",
    final_norm="gpt_neox.final_layer_norm",
)
"""The family of GPT-NeoX and Pythia models."""
