"""GPT-2, whose Conv1D modules store weights as [in, out]."""

from quantine.families.base import Family

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    blocks="transformer.h",
    groups=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    embedding="transformer.wte",
)
