"""Describing a model of transformers to the native decoder.

Every module is checked. If one is missing, unknown or of another class than expected, or an
attribute says something that the native decoder does not know, the model is refused.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from quantine.activations.attention import NAME as ROUNDING
from quantine.activations.modules import SITES_NAME
from quantine.families.gemma import GEMMA
from quantine.families.llama import LLAMA
from quantine.families.opt import OPT
from quantine.runtime.decoder_checks import check_model, classes_of, expect, refuse
from quantine.runtime.decoder_multipliers import MULTIPLIES, multipliers_of
from quantine.runtime.decoder_parts import Angles, Parts
from quantine.runtime.decoder_rounding import Roundings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYER_TYPES: Final = frozenset({"full_attention", "sliding_attention"})
"""Types of attention in ``config.layer_types`` that the native decoder has."""
LLAMA_LIKE: Final = (*LLAMA.model_types, *MULTIPLIES)
"""Model types with the blocks of the llama family."""
ONE_MASK: Final = frozenset({"llama", "mistral", "granite"})
"""Model types whose layers all have the same mask, whatever ``config.layer_types`` says."""
NORMED_HEADS: Final = frozenset({"qwen3", "gemma3_text"})
"""Model types that normalize the queries and keys of each head."""
CHOOSES_ROPE: Final = frozenset({"smollm3"})
"""Model types in which ``use_rope`` of an attention module says whether it rotates."""

PROJECTIONS: Final = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
"""Children that an attention module of the llama and gemma families must have."""
HEAD_NORMS: Final = frozenset({"q_norm", "k_norm"})
"""Further ones, where queries and keys are normalized."""
BLOCK: Final = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
"""Children that a decoder block of the llama family must have."""
GEMMA_BLOCK: Final = BLOCK | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
"""Children that a decoder block of the gemma family must have."""
OPT_BLOCK: Final = frozenset(
    {"self_attn", "self_attn_layer_norm", "fc1", "activation_fn", "fc2", "final_layer_norm"}
)
"""Children that a decoder block of the opt family must have."""


def arguments_for(model: PreTrainedModel, native: ModuleType, capacity: int) -> dict[str, Any]:
    """The arguments of ``quantine._native.Decoder`` that describe ``model``.

    Args:
        model: a model of the llama, gemma or opt family.
        native: the module ``quantine._native``.
        capacity: largest number of tokens that the decoder will see.

    Raises:
        BackendUnavailable: the native decoder would not compute the same; the message says why.
    """
    check_decodes(model)
    describe = _opt if model.config.model_type in OPT.model_types else _llama
    try:
        return describe(model, Parts(native, classes_of(model), Roundings(native)), capacity)
    except AttributeError as error:
        return refuse(f"something is missing: {error}")


def check_decodes(model: PreTrainedModel) -> None:
    """Check what needs no look at single blocks: the kind of model, and that it has no overrides.

    Raises:
        BackendUnavailable: there is no native decoder for this model; the message says why.
    """
    kind = model.config.model_type
    if kind not in (*LLAMA_LIKE, *GEMMA.model_types, *OPT.model_types):
        refuse(f"there is none for model type {kind!r}")
    classes_of(model)
    check_model(model)
    expect(model, type(model), "the model", {"model", "lm_head"})
    config: Any = model.config
    ahead = getattr(config, "use_bidirectional_attention", None)
    if ahead or not getattr(config, "is_causal", True):
        refuse("attention looks ahead")


def _llama(model: Any, parts: Parts, capacity: int) -> dict[str, Any]:
    config, body = model.config, model.model
    children = {"embed_tokens", "layers", "norm", "rotary_emb"}
    expect(body, parts.classes.named("TextModel", "Model"), "the model", children)
    expect(body.rotary_emb, parts.classes.named("RotaryEmbedding"), "the rotary embedding", ())
    if getattr(config, "final_logit_softcapping", None) is not None:
        refuse("logits are capped")
    angles = Angles(body.rotary_emb, parts.native, capacity)
    gemma, multipliers = config.model_type in GEMMA.model_types, multipliers_of(model)
    smaller = multipliers.residual
    blocks = [
        _llama_block(config, index, layer, parts, angles, gemma, smaller)
        for index, layer in enumerate(_layers(body.layers, config))
    ]
    matrix, factor = parts.embedding(body.embed_tokens)
    return {
        **_heads([layer.self_attn for layer in body.layers]),
        "embedding": matrix,
        "embedding_factor": factor * multipliers.embedding / smaller,
        "positions": None,
        "position_offset": 0,
        "blocks": blocks,
        "norm": parts.norm(body.norm, gemma, smaller, 1 / multipliers.logits),
        "head": parts.head(model.lm_head, body.embed_tokens),
    }


def _llama_block(
    config: Any,
    index: int,
    layer: Any,
    parts: Parts,
    angles: Angles,
    gemma: bool,
    smaller: float,
) -> Any:
    expect(layer, parts.classes.named("DecoderLayer"), "a block", GEMMA_BLOCK if gemma else BLOCK)
    attention, mlp = layer.self_attn, layer.mlp
    normed = config.model_type in NORMED_HEADS
    projections = PROJECTIONS | HEAD_NORMS if normed else PROJECTIONS
    children = projections | _sites(config, attention)
    expect(attention, parts.classes.named("Attention"), "attention", children)
    expect(
        mlp, parts.classes.named("MLP"), "an MLP", {"gate_proj", "up_proj", "down_proj", "act_fn"}
    )
    _check_attention(config, index, attention)
    kind, window = _mask(config, index)
    rotates = attention.use_rope if config.model_type in CHOOSES_ROPE else True

    states = parts.roundings.states(attention, attention.scaling)

    def norm(module: nn.Module) -> Any:
        return parts.norm(module, gemma)

    after = layer.post_attention_layernorm
    return parts.native.Block(
        attention_norm=parts.norm(layer.input_layernorm, gemma, smaller),
        after_attention=norm(after) if gemma else None,
        mlp_norm=parts.norm(layer.pre_feedforward_layernorm if gemma else after, gemma, smaller),
        after_mlp=norm(layer.post_feedforward_layernorm) if gemma else None,
        q=parts.linear(attention.q_proj),
        k=parts.linear(attention.k_proj),
        v=parts.linear(attention.v_proj),
        o=parts.linear(attention.o_proj),
        q_norm=norm(attention.q_norm) if normed else None,
        k_norm=norm(attention.k_norm) if normed else None,
        rotary=angles.of(kind, attention.head_dim) if rotates else None,
        attention_scale=attention.scaling if states is None else 1.0,  # else it scales scores
        states=states,
        window=window,
        gate=parts.linear(mlp.gate_proj),
        up=parts.linear(mlp.up_proj),
        down=parts.linear(mlp.down_proj),
        activation=parts.activation(mlp.act_fn),
    )


def _check_attention(config: Any, index: int, attention: Any) -> None:
    if getattr(attention, "attn_logit_softcapping", None) is not None:
        refuse("attention scores are capped")
    if not attention.is_causal:
        refuse("attention looks ahead")
    if attention.layer_idx != index:
        refuse(f"layer {index} keeps its keys as if it were layer {attention.layer_idx}")
    if attention.config is not config:
        refuse(f"layer {index} has a configuration of its own")


def _sites(config: Any, attention: Any) -> set[str]:
    """The child with which attention rounds, where its function does."""
    rounds = config._attn_implementation == ROUNDING and SITES_NAME in attention._modules
    return {SITES_NAME} if rounds else set()


def _mask(config: Any, index: int) -> tuple[str, int | None]:
    """The type of a layer's attention, and its window if it has one."""
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if getattr(config, "attention_chunk_size", None) is not None:
        refuse("attention is in chunks")
    if config.model_type in ONE_MASK:
        slides = config.model_type == "mistral" and window is not None
        kind = "sliding_attention" if slides else "full_attention"
        # The cache goes by these fields, too.
        if any(other != kind for other in types or ()) or (window is not None and not slides):
            refuse(f"masks and cache of a {config.model_type} with these layer types would differ")
    else:
        kind = "full_attention" if types is None else types[index]
    if kind not in LAYER_TYPES:
        refuse(f"layer {index} is of type {kind!r}")
    if kind == "full_attention":
        return kind, None
    if window is None or window < 1:
        refuse(f"layer {index} has a window of {window}")
    return kind, window


def _opt(model: Any, parts: Parts, capacity: int) -> dict[str, Any]:
    config, outer = model.config, model.model
    expect(outer, parts.classes.named("Model"), "the model", {"decoder"})
    body, kind = outer.decoder, parts.classes.named("Decoder")
    if not config.do_layer_norm_before:
        refuse("norms come after attention and MLP (do_layer_norm_before is false)")
    if type(body) is kind and (body.project_in is not None or body.project_out is not None):
        refuse("the embedding is narrower than the model")
    children = {"embed_tokens", "embed_positions", "layers", "final_layer_norm"}
    expect(body, kind, "the model", children)
    positions = body.embed_positions
    expect(positions, parts.classes.named("LearnedPositionalEmbedding"), "the positions", ())
    if positions.weight.shape[0] < positions.offset + capacity:
        refuse(f"the model has fewer than {capacity} positions")
    layers = _layers(body.layers, config)
    matrix, factor = parts.embedding(body.embed_tokens)
    return {
        "embedding": matrix,
        "embedding_factor": factor,
        "positions": parts.table(positions),
        "position_offset": positions.offset,
        "blocks": [_opt_block(config, index, layer, parts) for index, layer in enumerate(layers)],
        **_heads([layer.self_attn for layer in layers]),
        "norm": parts.norm(body.final_layer_norm),
        "head": parts.head(model.lm_head, body.embed_tokens),
    }


def _opt_block(config: Any, index: int, layer: Any, parts: Parts) -> Any:
    expect(layer, parts.classes.named("DecoderLayer"), "a block", OPT_BLOCK)
    attention = layer.self_attn
    children = {"q_proj", "k_proj", "v_proj", "out_proj"} | _sites(config, attention)
    expect(attention, parts.classes.named("Attention"), "attention", children)
    _check_attention(config, index, attention)
    if not layer.do_layer_norm_before:
        refuse("norms come after attention and MLP (do_layer_norm_before is false)")
    return parts.native.Block(
        attention_norm=parts.norm(layer.self_attn_layer_norm),
        mlp_norm=parts.norm(layer.final_layer_norm),
        q=parts.linear(attention.q_proj),
        k=parts.linear(attention.k_proj),
        v=parts.linear(attention.v_proj),
        o=parts.linear(attention.out_proj),
        rotary=None,
        attention_scale=attention.scaling,
        states=parts.roundings.states(attention, 1.0),  # queries are scaled before
        window=None,
        gate=None,
        up=parts.linear(layer.fc1),
        down=parts.linear(layer.fc2),
        activation=parts.activation(layer.activation_fn),
    )


def _layers(layers: nn.Module, config: Any) -> nn.ModuleList:
    if type(layers) is not nn.ModuleList:
        refuse(f"the list of blocks is a {type(layers).__name__}")
    if len(layers) != config.num_hidden_layers:
        refuse(f"the model has {len(layers)} blocks, but runs {config.num_hidden_layers}")
    return layers


def _heads(attentions: list[Any]) -> dict[str, int]:
    """Numbers of heads and their width, which all attention modules share."""
    found = set()
    for attention in attentions:
        dim = attention.head_dim
        heads, kv_heads = (
            int(projection.out_features) // dim
            for projection in (attention.q_proj, attention.k_proj)
        )
        if getattr(attention, "num_key_value_groups", heads // kv_heads) != heads // kv_heads:
            refuse("attention modules do not share keys among heads as their matrices say")
        if getattr(attention, "num_heads", heads) != heads:
            refuse("attention modules do not have as many heads as their matrices say")
        found.add((heads, kv_heads, dim))
    if len(found) != 1:
        refuse("blocks differ in their heads")
    heads, kv_heads, dim = found.pop()
    return {"heads": heads, "kv_heads": kv_heads, "dim": dim}
