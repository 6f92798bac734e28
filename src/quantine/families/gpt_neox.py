"""GPT-NeoX and Pythia. Attention and MLP may run in parallel; the groups hold either way."""

from quantine.families.base import Family

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
    renames=(("embed_out.", "lm_head."),),
)
