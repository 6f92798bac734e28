"""What the native decoder has to know of how models of one type are built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from quantine.runtime.decoder_heads import Heads, separate
from quantine.runtime.decoder_positions import Biases

Masks = Literal["full", "window", "types"]
"""Which tokens layers see: all before; those in ``config.sliding_window``, if that is a number; or
what ``config.layer_types`` says of each layer."""


def always(_: Any) -> bool:
    """True."""
    return True


def never(_: Any) -> bool:
    """False."""
    return False


def understood(_: Any) -> str:
    """Nothing to refuse."""
    return ""


@dataclass(frozen=True)
class Structure:
    """How models of one type are built; the defaults are those of Llama.

    Names are those of children; ``None`` where a model has no such module.

    Attributes:
        body: path of what is below the head.
        body_classes: endings of the name of its class, the first that exists.
        embedding, positions, embedding_norm, layers, norm, rotary: children of the body: the token
            table, a learned table of positions, a norm of their sum, the blocks, the last norm, and
            the module of angles.
        attention, mlp: children of a block; an empty name is the block itself.
        attention_norm, mlp_norm: norms of what these read.
        after_attention, after_mlp: norms of what these add to the residual stream.
        qkv: children of attention: three matrices, or one for all of queries, keys and values.
        o: the matrix after attention.
        head_norms: norms of queries and keys, of each head or of all heads at once.
        gate, up, down: matrices of the MLP; ``gate`` and ``up`` may be the halves of one. Without
            ``gate`` the MLP is ``down(activation(up(x)))``.
        activation: child of the MLP.
        idle: children, wherever they are, that may be there and are dropouts.
        one_plus: whether norms multiply by ``1 + weight``.
        heads: the heads of an attention module.
        scaling: of an attention module: the factor on products of queries and keys.
        scales_queries: whether queries are scaled before they are rounded, not the products.
        rotates: whether an attention module rotates queries and keys.
        neighbours, partial: as for `quantine.runtime.decoder_positions.Angles`.
        biases: what is added to scores.
        masks: which tokens a layer sees.
        caps_scores: whether attention caps scores where its ``attn_logit_softcapping`` says so.
        caps_logits: whether logits are capped where ``config.final_logit_softcapping`` says so.
        parallel: of a block: whether its MLP reads what attention reads.
        registered: whether attention is one of transformers' registered functions.
        refused: of a block: why it computes something that the native decoder does not; empty if
            it does not.
    """

    body: str = "model"
    body_classes: tuple[str, ...] = ("TextModel", "Model")
    embedding: str = "embed_tokens"
    positions: str | None = None
    embedding_norm: str | None = None
    layers: str = "layers"
    norm: str = "norm"
    rotary: str | None = "rotary_emb"
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    after_attention: str | None = None
    after_mlp: str | None = None
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    o: str = "o_proj"
    head_norms: tuple[str, ...] = ()
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    idle: frozenset[str] = frozenset()
    one_plus: bool = False
    heads: Callable[[Any], Heads] = separate
    scaling: Callable[[Any], float] = attrgetter("scaling")
    scales_queries: bool = False
    rotates: Callable[[Any], bool] = always
    neighbours: bool = False
    partial: bool = False
    biases: Biases | None = None
    masks: Masks = "types"
    caps_scores: bool = False
    caps_logits: bool = False
    parallel: Callable[[Any], bool] = never
    registered: bool = True
    refused: Callable[[Any], str] = understood
