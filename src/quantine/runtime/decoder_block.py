"""Turning a block of a model into a block of the native decoder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from quantine.activations.attention import NAME as ROUNDING
from quantine.activations.modules import SITES_NAME
from quantine.runtime.decoder_checks import Classes, dropouts, expect, refuse
from quantine.runtime.decoder_heads import Heads, halves, outputs_of
from quantine.runtime.decoder_masks import mask_of
from quantine.runtime.decoder_parts import Parts
from quantine.runtime.decoder_positions import Angles
from quantine.runtime.decoder_structure import Structure


@dataclass(frozen=True)
class Blocks:
    """Turns the blocks of a model into parts of the native decoder.

    Attributes:
        config: the model's configuration.
        structure: how the model is built.
        parts: turns modules into parts.
        angles: tables of angles; ``None`` in models without.
        bias: the native ``ScoreBias`` of all blocks; ``None`` in models without.
        smaller: what the model's residual stream is divided by in the native decoder.
    """

    config: Any
    structure: Structure
    parts: Parts
    angles: Angles | None
    bias: Any
    smaller: float

    def block(self, index: int, layer: Any) -> Any:
        """The native ``Block`` of the block number ``index``, which passed `check_known`.

        Raises:
            BackendUnavailable: the native decoder would not compute the same.
        """
        structure = self.structure
        self._check_block(layer)
        attention = layer.get_submodule(structure.attention)
        self._check_attention(index, attention)
        heads = structure.heads(attention)
        q, k, v = self._qkv(attention, heads)
        q_norm, k_norm = structure.head_norms or (None, None)
        kind, window = mask_of(self.config, structure, index)
        turned = self.angles if structure.rotates(attention) else None
        scaling = structure.scaling(attention)
        states = self._states(attention, heads, scaling)
        scales_queries = states is None or structure.scales_queries
        return self.parts.native.Block(
            attention_norm=self._norm(layer, structure.attention_norm, self.smaller),
            mlp_norm=self._norm(layer, structure.mlp_norm, self.smaller),
            after_attention=self._norm(layer, structure.after_attention),
            after_mlp=self._norm(layer, structure.after_mlp),
            q=q,
            k=k,
            v=v,
            o=self.parts.linear(attention.get_submodule(structure.o)),
            q_norm=self._norm(attention, q_norm),
            k_norm=self._norm(attention, k_norm),
            rotary=None if turned is None else turned.of(kind, heads.dim),
            attention_scale=scaling if scales_queries else 1.0,
            states=states,
            scoring=self.parts.native.Scoring(
                window=window, cap=self._cap(attention), bias=self.bias
            ),
            parallel=bool(structure.parallel(layer)),
            **self._mlp(layer.get_submodule(structure.mlp)),
        )

    def _check_block(self, layer: Any) -> None:
        structure = self.structure
        norms = {
            structure.attention_norm,
            structure.mlp_norm,
            structure.after_attention,
            structure.after_mlp,
        }
        needed = {structure.attention, *(name for name in norms if name is not None)}
        needed |= {structure.mlp} if structure.mlp else self._mlp_children()
        expect(layer, type(layer), "a block", needed | dropouts(layer, structure.idle))
        if getattr(layer, "config", self.config) is not self.config:
            refuse("a block has a configuration of its own")

    def _check_attention(self, index: int, attention: Any) -> None:
        structure = self.structure
        needed = {*structure.qkv, structure.o, *structure.head_norms, *self._sites(attention)}
        idle = dropouts(attention, structure.idle)
        expect(attention, self.parts.classes.named("Attention"), "attention", needed | idle)
        if not getattr(attention, "is_causal", True):
            refuse("attention looks ahead")
        if attention.layer_idx != index:
            refuse(f"layer {index} keeps its keys as if it were layer {attention.layer_idx}")
        if getattr(attention, "config", self.config) is not self.config:
            refuse(f"layer {index} has a configuration of its own")

    def _sites(self, attention: Any) -> set[str]:
        """The child with which attention rounds, where its function does."""
        rounds = self.structure.registered and self.config._attn_implementation == ROUNDING
        return {SITES_NAME} if rounds and SITES_NAME in attention._modules else set()

    def _states(self, attention: Any, heads: Heads, scaling: float) -> Any:
        factor = 1.0 if self.structure.scales_queries else scaling
        states = self.parts.roundings.states(attention, heads.dim, factor)
        if states is not None and self.bias is not None:
            refuse("attention rounds, and adds biases to scores")
        return states

    def _cap(self, attention: Any) -> float | None:
        """The bound of scores, ``None`` where they have none."""
        cap: float | None = getattr(attention, "attn_logit_softcapping", None)
        if cap is None:
            return None
        if not (
            self.structure.caps_scores and self.config._attn_implementation in {"eager", ROUNDING}
        ):
            refuse(
                f"attention scores are capped, by {self.config._attn_implementation!r} attention"
            )
        return positive(cap, "attention scores")

    def _qkv(self, attention: Any, heads: Heads) -> list[Any]:
        modules = [attention.get_submodule(name) for name in self.structure.qkv]
        if len(modules) > 1:
            return [self.parts.linear(module) for module in modules]
        slices = heads.slices(outputs_of(modules[0]))
        return [self.parts.linear(modules[0], part) for part in slices]

    def _mlp_children(self) -> set[str]:
        structure = self.structure
        gate = set() if structure.gate is None else {structure.gate}
        return {structure.up, structure.down, structure.activation} | gate

    def _mlp(self, mlp: Any) -> dict[str, Any]:
        structure, linear = self.structure, self.parts.linear
        if structure.mlp:
            needed = self._mlp_children() | dropouts(mlp, structure.idle)
            expect(mlp, self.parts.classes.named("MLP"), "an MLP", needed)
        up = mlp.get_submodule(structure.up)
        if structure.gate is None:
            parts = (None, linear(up))
        elif structure.gate == structure.up:
            first, second = halves(outputs_of(up))
            parts = (linear(up, first), linear(up, second))
        else:
            parts = (linear(mlp.get_submodule(structure.gate)), linear(up))
        return {
            "gate": parts[0],
            "up": parts[1],
            "down": linear(mlp.get_submodule(structure.down)),
            "activation": self.parts.activation(mlp.get_submodule(structure.activation)),
        }

    def _norm(self, owner: nn.Module, name: str | None, smaller: float = 1.0) -> Any:
        if name is None:
            return None
        return self.parts.norm(owner.get_submodule(name), self.structure.one_plus, smaller)


def check_known(layers: Iterable[nn.Module], structure: Structure, classes: Classes) -> None:
    """Check that blocks are of the class that belongs there, and compute nothing unknown.

    Raises:
        BackendUnavailable: one is not, or does.
    """
    kind = classes.named("DecoderLayer", "Layer", "Block")
    for layer in layers:
        if type(layer) is not kind:
            refuse(f"a block is a {type(layer).__name__}")
        reason = structure.refused(layer)
        if reason:
            refuse(reason)


def positive(cap: float, what: str) -> float:
    """``cap``, if it is one.

    Raises:
        BackendUnavailable: it is not above 0.
    """
    if not cap > 0:
        refuse(f"{what} are capped by {cap}")
    return float(cap)
