"""The Falcon architecture, with its old and its new decoder."""

from quantine.families.family import Family

FALCON = Family(
    name="falcon",
    model_types=("falcon",),
    blocks="transformer.h",
    groups=(
        ("self_attention.query_key_value",),
        ("self_attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
    embedding="transformer.word_embeddings",
    outputs=2,
)
"""The family of Falcon models; reorders differ with their configurations, and are found."""
