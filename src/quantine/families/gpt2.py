"""The GPT-2 architecture, whose Conv1D modules store weights as ``[in, out]``."""

from quantine.families.family import Family, Link

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    blocks="transformer.h",
    groups=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    embedding="transformer.wte",
    links=(
        Link("R1", "gather", ("ln_1",), ("attn.c_attn",)),
        Link("R2", "attention", ("attn.c_attn",), per_head=True),
        Link("R3", "weights", ("attn.c_attn",), ("attn.c_proj",), per_head=True, rows="last"),
        Link("R4", "gather", ("ln_2",), ("mlp.c_fc",)),
        Link("R5", "weights", ("mlp.c_fc",), ("mlp.c_proj",)),
    ),
    links_need=(("reorder_and_upcast_attn", False),),
    attention="attn",
    final_norm="transformer.ln_f",
    positions="transformer.wpe",
)
"""The family of GPT-2 models; activations can be quantized where attention is a common function."""
