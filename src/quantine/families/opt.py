"""OPT. The projections around the decoder of opt-350m stay in 16 bit."""

from quantine.families.base import Family

OPT = Family(
    name="opt",
    model_types=("opt",),
    blocks="model.decoder.layers",
    groups=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
    embedding="model.decoder.embed_tokens",
)
