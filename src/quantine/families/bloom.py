"""BLOOM."""

from quantine.families.base import Family

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
    returns_tuple=True,
)
