"""The OPT architecture. The projections around the decoder of opt-350m stay in 16 bit."""

from quantine.families.family import Family, Link

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
    links=(
        Link(
            "R1",
            "gather",
            ("self_attn_layer_norm",),
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ),
        Link("R2", "weights", ("self_attn.q_proj", "self_attn.k_proj"), per_head=True),
        Link("R3", "weights", ("self_attn.v_proj",), ("self_attn.out_proj",), per_head=True),
        Link("R4", "gather", ("final_layer_norm",), ("fc1",)),
        Link("R5", "weights", ("fc1",), ("fc2",)),
    ),
    final_norm="model.decoder.final_layer_norm",
    positions="model.decoder.embed_positions",
    links_need=(("do_layer_norm_before", True),),
)
"""The family of OPT models; activations can be quantized only where norms come before layers."""
