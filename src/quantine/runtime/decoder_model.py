"""Describing a model of transformers to the native decoder.

Every module is checked. If one is missing, unknown or of another class than expected, or an
attribute says something that the native decoder does not know, the model is refused.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from quantine.runtime.decoder_block import Blocks, check_known, positive
from quantine.runtime.decoder_checks import check_model, classes_of, dropouts, expect, refuse
from quantine.runtime.decoder_heads import Heads
from quantine.runtime.decoder_multipliers import multipliers_of
from quantine.runtime.decoder_parts import Parts
from quantine.runtime.decoder_positions import Angles, offset_of
from quantine.runtime.decoder_rounding import Roundings
from quantine.runtime.decoder_structure import Structure
from quantine.runtime.decoder_structures import STRUCTURES, structure_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def arguments_for(model: PreTrainedModel, native: ModuleType, capacity: int) -> dict[str, Any]:
    """The arguments of ``quantine._native.Decoder`` that describe ``model``.

    Args:
        model: a model of a type in `STRUCTURES`.
        native: the module ``quantine._native``.
        capacity: largest number of tokens that the decoder will see.

    Raises:
        BackendUnavailable: the native decoder would not compute the same; the message says why.
    """
    check_decodes(model)
    parts = Parts(native, classes_of(model), Roundings(native))
    try:
        return _described(model, structure_of(model), parts, capacity)
    except AttributeError as error:
        return refuse(f"something is missing: {error}")


def check_decodes(model: PreTrainedModel) -> None:
    """Check what needs no look at single blocks: the kind of model, and that it has no overrides.

    Raises:
        BackendUnavailable: there is no native decoder for this model; the message says why.
    """
    kind = model.config.model_type
    if kind not in STRUCTURES:
        refuse(f"there is none for model type {kind!r}")
    classes_of(model)
    check_model(model)
    body = STRUCTURES[kind].body.partition(".")[0]
    expect(model, type(model), "the model", {body, "lm_head"})
    config: Any = model.config
    ahead = getattr(config, "use_bidirectional_attention", None)
    if ahead or not getattr(config, "is_causal", True):
        refuse("attention looks ahead")


def _described(model: Any, structure: Structure, parts: Parts, capacity: int) -> dict[str, Any]:
    config, body = model.config, model.get_submodule(structure.body)
    layers = _layers(body.get_submodule(structure.layers), config)
    check_known(layers, structure, parts.classes)
    _check_body(model, body, structure, parts)
    multipliers = multipliers_of(model)
    smaller = multipliers.residual
    angles, bias = (
        _angles(body, structure, parts, capacity),
        _bias(body, structure, parts, capacity),
    )
    blocks = Blocks(config, structure, parts, angles, bias, smaller)
    table = body.get_submodule(structure.embedding)
    matrix, factor = parts.embedding(table)
    last = body.get_submodule(structure.norm)
    normed = structure.embedding_norm
    return {
        "blocks": [blocks.block(index, layer) for index, layer in enumerate(layers)],
        **_heads([structure.heads(layer.get_submodule(structure.attention)) for layer in layers]),
        "embedding": matrix,
        "embedding_factor": factor * multipliers.embedding / smaller,
        "embedding_norm": None if normed is None else parts.norm(body.get_submodule(normed)),
        **_positions(body, structure, parts, capacity),
        "norm": parts.norm(last, structure.one_plus, smaller, 1 / multipliers.logits),
        "head": parts.head(model.lm_head, table),
        "logit_cap": _logit_cap(config, structure),
    }


def _check_body(model: Any, body: nn.Module, structure: Structure, parts: Parts) -> None:
    outer, _, inner = structure.body.partition(".")
    if inner:
        expect(model.get_submodule(outer), parts.classes.named("Model"), "the model", {inner})
    named = {
        structure.embedding,
        structure.positions,
        structure.embedding_norm,
        structure.layers,
        structure.norm,
        structure.rotary,
    }
    children = {name for name in named if name is not None} | dropouts(body, structure.idle)
    expect(body, parts.classes.named(*structure.body_classes), "the model", children)
    if getattr(body, "config", None) is not model.config:
        refuse("the body of the model has a configuration of its own")


def _layers(layers: nn.Module, config: Any) -> nn.ModuleList:
    if type(layers) is not nn.ModuleList:
        refuse(f"the list of blocks is a {type(layers).__name__}")
    if len(layers) != config.num_hidden_layers:
        refuse(f"the model has {len(layers)} blocks, but runs {config.num_hidden_layers}")
    return layers


def _angles(body: nn.Module, structure: Structure, parts: Parts, capacity: int) -> Angles | None:
    if structure.rotary is None:
        return None
    rotary = body.get_submodule(structure.rotary)
    expect(rotary, parts.classes.named("RotaryEmbedding"), "the rotary embedding", ())
    return Angles(rotary, parts.native, capacity, structure.neighbours, structure.partial)


def _bias(body: nn.Module, structure: Structure, parts: Parts, capacity: int) -> Any:
    """The native ``ScoreBias``, ``None`` in models without."""
    if structure.biases is None:
        return None
    return parts.native.ScoreBias(structure.biases(body, parts.classes, capacity).contiguous())


def _positions(
    body: nn.Module, structure: Structure, parts: Parts, capacity: int
) -> dict[str, Any]:
    if structure.positions is None:
        return {"positions": None, "position_offset": 0}
    table = body.get_submodule(structure.positions)
    offset = offset_of(table, parts.classes, capacity)
    return {"positions": parts.table(table), "position_offset": offset}


def _logit_cap(config: Any, structure: Structure) -> float | None:
    """The bound of logits, ``None`` where they have none."""
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None and not structure.caps_logits:
        refuse("logits are capped")
    return None if cap is None else positive(cap, "logits")


def _heads(found: list[Heads]) -> dict[str, int]:
    """Numbers of heads and their width, which all attention modules share."""
    if len(set(found)) != 1:
        refuse("blocks differ in their heads")
    return {"heads": found[0].heads, "kv_heads": found[0].kv_heads, "dim": found[0].dim}
