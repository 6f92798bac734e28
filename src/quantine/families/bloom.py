"""The BLOOM architecture, with q, k and v of each head interleaved in one matrix."""

from quantine.families.family import Family, Link

BLOOM = Family(
    name="bloom",
    model_types=("bloom",),
    blocks="transformer.h",
    groups=(
        ("self_attention.query_key_value",),
        ("self_attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
    embedding="transformer.word_embeddings",
    links=(
        Link("R1", "gather", ("input_layernorm",), ("self_attention.query_key_value",)),
        Link("R2", "attention", ("self_attention.query_key_value",), per_head=True),
        Link(
            "R3",
            "weights",
            ("self_attention.query_key_value",),
            ("self_attention.dense",),
            per_head=True,
            rows="interleaved",
        ),
        Link("R4", "gather", ("post_attention_layernorm",), ("mlp.dense_h_to_4h",)),
        Link("R5", "weights", ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)),
    ),
    links_need=(("apply_residual_connection_post_layernorm", False),),
    attention="",
    key_heads="",
    final_norm="transformer.ln_f",
    outputs=2,
)
"""The family of BLOOM models, which compute attention in a way of their own."""
