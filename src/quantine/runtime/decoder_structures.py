"""How models of each type are built, as data.

Classes and attributes are those of transformers. What a structure says of a type is proved by tests
that compare the native decoder with the modules; that a model is built as its structure says is
checked module by module, see `quantine.runtime.decoder_model`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from operator import attrgetter
from typing import Any, Final

from quantine.runtime import decoder_heads as heads
from quantine.runtime import decoder_positions as positions
from quantine.runtime.decoder_structure import Structure, always, never

HEAD_NORMS: Final = ("q_norm", "k_norm")


def _refused_in_opt(layer: Any) -> str:
    if layer.do_layer_norm_before:
        return ""
    return "norms come after attention and MLP (do_layer_norm_before is false)"


def _refused_in_bloom(layer: Any) -> str:
    if layer.apply_residual_connection_post_layernorm:
        return "norms are added to the residual stream (apply_residual_connection_post_layernorm)"
    if layer.self_attention.beta != 1.0:
        return "biases of scores are scaled"
    for part in (layer.self_attention, layer.mlp):
        if part.pretraining_tp > 1 and part.slow_but_exact:
            return "products are sums of parts (slow_but_exact)"
    return ""


def _falcon_scaling(attention: Any) -> float:
    return 1.0 / math.sqrt(attention.head_dim)


def _falcon_is_parallel(layer: Any) -> bool:
    return bool(layer.config.parallel_attn)


def _refused_in_falcon(layer: Any) -> str:
    config = layer.config
    if config.new_decoder_architecture and not config.parallel_attn:
        return "attention and MLP of the new architecture are not parallel"
    if config.output_attentions:  # another function, which takes the mask as numbers
        return "attention gives its probabilities (output_attentions)"
    return ""


LLAMA_LIKE: Final = Structure()
"""How models like Llama are built."""
FULL: Final = replace(LLAMA_LIKE, masks="full")
WINDOW: Final = replace(LLAMA_LIKE, masks="window")
NORMED_HEADS: Final = replace(LLAMA_LIKE, head_norms=HEAD_NORMS)
GEMMA_2: Final = replace(
    LLAMA_LIKE,
    mlp_norm="pre_feedforward_layernorm",
    after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
    one_plus=True,
    caps_scores=True,
    caps_logits=True,
)
PHI_3: Final = replace(
    WINDOW,
    qkv=("qkv_proj",),
    gate="gate_up_proj",
    up="gate_up_proj",
    activation="activation_fn",
    idle=frozenset({"resid_attn_dropout", "resid_mlp_dropout"}),
    heads=heads.of_phi3,
    partial=True,
)
"""One matrix for queries, keys and values, and one for gate and up."""
OLMO_2: Final = replace(
    FULL,
    attention_norm=None,
    mlp_norm=None,
    after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
    head_norms=HEAD_NORMS,
)
"""Norms only of what is added; those of queries and keys are of all heads at once."""
GLM_4: Final = replace(
    FULL,
    after_attention="post_self_attn_layernorm",
    after_mlp="post_mlp_layernorm",
    gate="gate_up_proj",
    up="gate_up_proj",
    activation="activation_fn",
    neighbours=True,
    partial=True,
)
OPT: Final = Structure(
    body="model.decoder",
    body_classes=("Decoder",),
    positions="embed_positions",
    norm="final_layer_norm",
    rotary=None,
    mlp="",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    o="out_proj",
    gate=None,
    up="fc1",
    down="fc2",
    activation="activation_fn",
    scales_queries=True,
    rotates=never,
    masks="full",
    refused=_refused_in_opt,
)
GPT_2: Final = Structure(
    body="transformer",
    embedding="wte",
    positions="wpe",
    layers="h",
    norm="ln_f",
    rotary=None,
    attention="attn",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    qkv=("c_attn",),
    o="c_proj",
    gate=None,
    up="c_fc",
    down="c_proj",
    activation="act",
    idle=frozenset({"drop", "attn_dropout", "resid_dropout", "dropout"}),
    heads=heads.of_gpt2,
    rotates=never,
    masks="full",
)
GPT_NEOX: Final = Structure(
    body="gpt_neox",
    embedding="embed_in",
    norm="final_layer_norm",
    attention="attention",
    qkv=("query_key_value",),
    o="dense",
    gate=None,
    up="dense_h_to_4h",
    down="dense_4h_to_h",
    activation="act",
    idle=frozenset({"emb_dropout", "post_attention_dropout", "post_mlp_dropout"}),
    heads=heads.of_gpt_neox,
    partial=True,
    masks="full",
    parallel=attrgetter("use_parallel_residual"),
)
BLOOM: Final = replace(
    GPT_NEOX,
    body="transformer",
    embedding="word_embeddings",
    embedding_norm="word_embeddings_layernorm",
    layers="h",
    norm="ln_f",
    rotary=None,
    attention="self_attention",
    activation="gelu_impl",
    idle=frozenset({"attention_dropout"}),
    heads=heads.of_bloom,
    scaling=attrgetter("inv_norm_factor"),
    rotates=never,
    biases=positions.of_bloom,
    parallel=never,
    registered=False,
    refused=_refused_in_bloom,
)
FALCON: Final = replace(
    BLOOM,
    embedding_norm=None,
    rotary="rotary_emb",
    activation="act",
    heads=heads.of_falcon,
    scaling=_falcon_scaling,
    rotates=always,
    biases=None,
    partial=False,
    parallel=_falcon_is_parallel,
    refused=_refused_in_falcon,
)
"""With rotary embeddings, and norms of attention and MLP apart; see `structure_of`."""

STRUCTURES: Final[dict[str, Structure]] = {
    "llama": FULL,
    "mistral": WINDOW,
    "qwen2": LLAMA_LIKE,
    "qwen3": NORMED_HEADS,
    "smollm3": replace(LLAMA_LIKE, rotates=attrgetter("use_rope")),
    "granite": FULL,
    "gemma2": GEMMA_2,
    "gemma3_text": replace(GEMMA_2, head_norms=HEAD_NORMS, caps_scores=False),
    "phi3": PHI_3,
    "olmo2": OLMO_2,
    "glm4": GLM_4,
    "opt": OPT,
    "gpt2": GPT_2,
    "gpt_neox": GPT_NEOX,
    "bloom": BLOOM,
    "falcon": FALCON,
}
"""Structures by model type."""


def structure_of(model: Any) -> Structure:
    """The structure of ``model``, whose type is in `STRUCTURES`.

    Falcon's depends on settings: with ALiBi nothing is rotated, and where attention and MLP are
    parallel they have a norm each, or share one.
    """
    structure = STRUCTURES[model.config.model_type]
    if structure is not FALCON:
        return structure
    config = model.config
    if model.transformer.use_alibi:
        structure = replace(structure, rotates=never, biases=positions.of_falcon)
    if not config.parallel_attn:
        return structure
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn == 2:
        return replace(structure, attention_norm="ln_attn", mlp_norm="ln_mlp")
    return replace(structure, mlp_norm="input_layernorm")
