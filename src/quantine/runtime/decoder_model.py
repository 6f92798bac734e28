"""Describing a model of transformers to the native decoder.

Every module is checked. If one is missing, unknown or of another type than expected, the model is
refused, since the native decoder might compute something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch
from torch import Tensor, nn

from quantine.errors import BackendUnavailable
from quantine.families.gemma import GEMMA
from quantine.families.llama import LLAMA
from quantine.families.opt import OPT
from quantine.kernels.matrix import float_matrix
from quantine.kernels.matrix.cpu import TILE
from quantine.runtime.modules import QuantEmbedding, QuantLinear, TiedHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ACTIVATIONS: Final = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
}
"""Native names of activation functions by the name of their class in torch or transformers."""

STATIC_ROPE: Final = frozenset({"default", "linear", "llama3", "yarn"})
"""Types of rotary embeddings whose angles do not depend on the length of the text."""

LAYER_TYPES: Final = frozenset({"full_attention", "sliding_attention"})
"""Types of attention in ``config.layer_types`` that the native decoder has."""
ATTENTION: Final = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
"""Children that an attention module of the llama and gemma families must have."""
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
    check_state(model)
    parts = _Parts(native)
    kind = model.config.model_type
    if kind in (*LLAMA.model_types, *GEMMA.model_types):
        return _llama(model, parts, capacity)
    if kind in OPT.model_types:
        return _opt(model, parts, capacity)
    return _refuse(f"there is none for model type {kind!r}")


def _llama(model: Any, parts: _Parts, capacity: int) -> dict[str, Any]:
    config, body = model.config, model.model
    _expect(body, "the model", {"embed_tokens", "layers", "norm", "rotary_emb"})
    if getattr(config, "final_logit_softcapping", None) is not None:
        _refuse("logits are capped")
    angles = _Angles(body.rotary_emb, parts.native, capacity)
    blocks = [_llama_block(config, layer, parts, angles) for layer in body.layers]
    attention = body.layers[0].self_attn
    return {
        **_heads(attention, attention.head_dim),
        "embedding": parts.matrix(body.embed_tokens),
        "embedding_factor": _embedding_factor(body.embed_tokens),
        "positions": None,
        "position_offset": 0,
        "blocks": blocks,
        "norm": parts.norm(body.norm),
        "head": parts.linear(model.lm_head),
    }


def _llama_block(config: Any, layer: Any, parts: _Parts, angles: _Angles) -> Any:
    gemma = hasattr(layer, "pre_feedforward_layernorm")
    attention, mlp = layer.self_attn, layer.mlp
    _expect(layer, "a block", GEMMA_BLOCK if gemma else BLOCK)
    _expect(attention, "attention", ATTENTION, {"q_norm", "k_norm"})
    _expect(mlp, "an MLP", {"gate_proj", "up_proj", "down_proj", "act_fn"})
    if getattr(attention, "attn_logit_softcapping", None) is not None:
        _refuse("attention scores are capped")
    if not attention.is_causal:
        _refuse("attention looks ahead")
    kind = _layer_type(config, attention.layer_idx)
    after = layer.post_attention_layernorm
    return parts.native.Block(
        attention_norm=parts.norm(layer.input_layernorm),
        after_attention=parts.norm(after) if gemma else None,
        mlp_norm=parts.norm(layer.pre_feedforward_layernorm if gemma else after),
        after_mlp=parts.norm(layer.post_feedforward_layernorm) if gemma else None,
        q=parts.linear(attention.q_proj),
        k=parts.linear(attention.k_proj),
        v=parts.linear(attention.v_proj),
        o=parts.linear(attention.o_proj),
        q_norm=parts.norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        k_norm=parts.norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        rotary=angles.of(kind, attention.head_dim) if getattr(attention, "use_rope", 1) else None,
        attention_scale=attention.scaling,
        window=config.sliding_window if kind == "sliding_attention" else None,
        gate=parts.linear(mlp.gate_proj),
        up=parts.linear(mlp.up_proj),
        down=parts.linear(mlp.down_proj),
        activation=_activation(mlp.act_fn),
    )


def _layer_type(config: Any, index: int) -> str:
    # Where each layer has a type, it decides on masks; Mistral has a window for all or for none.
    types = getattr(config, "layer_types", None)
    if types is None:
        slides = config.model_type == "mistral" and config.sliding_window is not None
        return "sliding_attention" if slides else "full_attention"
    if types[index] not in LAYER_TYPES:
        _refuse(f"layer {index} is of type {types[index]!r}")
    return str(types[index])


def _opt(model: Any, parts: _Parts, capacity: int) -> dict[str, Any]:
    body = model.model.decoder
    if not model.config.do_layer_norm_before:
        _refuse("norms come after attention and MLP (do_layer_norm_before is false)")
    if body.project_in is not None or body.project_out is not None:
        _refuse("the embedding is narrower than the model")
    _expect(body, "the model", {"embed_tokens", "embed_positions", "layers", "final_layer_norm"})
    positions = body.embed_positions
    if positions.weight.shape[0] < positions.offset + capacity:
        _refuse(f"the model has fewer than {capacity} positions")
    return {
        **_heads(body.layers[0].self_attn, body.layers[0].self_attn.head_dim),
        "embedding": parts.matrix(body.embed_tokens),
        "embedding_factor": _embedding_factor(body.embed_tokens),
        "positions": parts.float_matrix(positions.weight),
        "position_offset": positions.offset,
        "blocks": [_opt_block(layer, parts) for layer in body.layers],
        "norm": parts.norm(body.final_layer_norm),
        "head": parts.linear(model.lm_head),
    }


def _opt_block(layer: Any, parts: _Parts) -> Any:
    attention = layer.self_attn
    _expect(layer, "a block", OPT_BLOCK)
    _expect(attention, "attention", {"q_proj", "k_proj", "v_proj", "out_proj"})
    return parts.native.Block(
        attention_norm=parts.norm(layer.self_attn_layer_norm),
        mlp_norm=parts.norm(layer.final_layer_norm),
        q=parts.linear(attention.q_proj),
        k=parts.linear(attention.k_proj),
        v=parts.linear(attention.v_proj),
        o=parts.linear(attention.out_proj),
        rotary=None,
        attention_scale=attention.scaling,
        window=None,
        gate=None,
        up=parts.linear(layer.fc1),
        down=parts.linear(layer.fc2),
        activation=_activation(layer.activation_fn),
    )


@dataclass(frozen=True)
class _Parts:
    """Turns modules into parts of the native decoder.

    Attributes:
        native: the module ``quantine._native``.
        matrices: native matrices by the identity of the float weight, so that a weight which two
            modules share becomes one matrix.
    """

    native: ModuleType
    matrices: dict[int, Any] = field(default_factory=dict)

    def linear(self, module: nn.Module) -> Any:
        bias = getattr(module, "bias", None)
        return self.native.Linear(self.matrix(module), None if bias is None else _vector(bias))

    def matrix(self, module: nn.Module) -> Any:
        if isinstance(module, TiedHead):
            module = module.table
        if isinstance(module, QuantLinear | QuantEmbedding):
            matrix = module.matrix()
            if matrix is None:
                size = module.spec.group_size
                _refuse(f"groups of {size} outputs of a matrix are no multiple of {TILE}")
            return matrix
        plain = type(module) in (nn.Linear, nn.Embedding)
        if not plain and not hasattr(module, "scalar_embed_scale"):  # Gemma's embedding
            _refuse(f"a matrix is in a {type(module).__name__}")
        weight: Any = module.weight
        return self.float_matrix(weight)

    def float_matrix(self, weight: Tensor) -> Any:
        if id(weight) not in self.matrices:
            self.matrices[id(weight)] = float_matrix(weight.detach())
        return self.matrices[id(weight)]

    def norm(self, module: Any) -> Any:
        if type(module) is nn.LayerNorm:
            weight, bias = module.weight, module.bias
            width = module.normalized_shape
            return self.native.Norm(
                _vector(
                    torch.ones(width, dtype=torch.float32, device="cpu")
                    if weight is None
                    else weight
                ),
                _vector(
                    torch.zeros(width, dtype=torch.float32, device="cpu") if bias is None else bias
                ),
                module.eps,
            )
        if hasattr(module, "variance_epsilon"):
            return self.native.Norm(_vector(module.weight), None, module.variance_epsilon)
        if type(module).__name__ in {"Gemma2RMSNorm", "Gemma3RMSNorm"}:
            return self.native.Norm(_vector(module.weight) + 1.0, None, module.eps)
        return _refuse(f"a norm is a {type(module).__name__}")


@dataclass(frozen=True)
class _Angles:
    """Native tables of the cosines and sines of rotary embeddings, one for each type of layer.

    Attributes:
        rotary: the model's module of rotary embeddings.
        native: the module ``quantine._native``.
        capacity: number of positions in a table.
        tables: the tables made so far, by type of layer.
    """

    rotary: Any
    native: ModuleType
    capacity: int
    tables: dict[str, Any] = field(default_factory=dict)

    def of(self, layer_type: str, head_dim: int) -> Any:
        if layer_type not in self.tables:
            self.tables[layer_type] = self._table(layer_type, head_dim)
        return self.tables[layer_type]

    def _table(self, layer_type: str, head_dim: int) -> Any:
        several = isinstance(self.rotary.rope_type, dict)
        kind = self.rotary.rope_type[layer_type] if several else self.rotary.rope_type
        if kind not in STATIC_ROPE:
            _refuse(f"rotary embeddings are of type {kind!r}")
        probe = torch.empty(0, dtype=torch.float32, device="cpu")
        positions = torch.arange(self.capacity, device="cpu").unsqueeze(0)
        cos, sin = self.rotary(probe, positions, *([layer_type] if several else []))
        if cos.shape[-1] != head_dim:
            _refuse("only a part of each head is rotated")
        half = head_dim // 2  # the second half repeats the first
        return self.native.Rotary(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())


def check_state(model: PreTrainedModel) -> None:
    """Check that ``model``, of whatever family, is in a state that the native decoder reproduces.

    Raises:
        BackendUnavailable: it is in training mode, not on the CPU, has hooks, or has another
            attention function than ``eager`` or ``sdpa``.
    """
    if model.training:
        _refuse("the model is in training mode")
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    elsewhere = sorted(str(device) for device in devices if device.type != "cpu")
    if elsewhere:
        _refuse(f"the model is not on the CPU, but on {', '.join(elsewhere)}")
    if model.config._attn_implementation not in {None, "eager", "sdpa"}:
        _refuse(f"attention is {model.config._attn_implementation!r}")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            _refuse(f"{name or 'the model'} has hooks")


def _heads(attention: Any, dim: int) -> dict[str, int]:
    def heads(projection: Any) -> int:
        return int(projection.out_features) // dim

    return {"heads": heads(attention.q_proj), "kv_heads": heads(attention.k_proj), "dim": dim}


def _embedding_factor(module: Any) -> float:
    if isinstance(module, QuantEmbedding):
        return module.factor
    factor = getattr(module, "embed_scale", None)
    return 1.0 if factor is None else float(factor.to(module.weight.dtype))


def _activation(module: nn.Module) -> str:
    name = type(module).__name__
    if name not in ACTIVATIONS:
        _refuse(f"the activation is a {name}")
    return ACTIVATIONS[name]


def _expect(
    module: nn.Module, what: str, needed: Iterable[str], possible: Iterable[str] = ()
) -> None:
    names = {name for name, _ in module.named_children()}
    odd = (names - {*needed, *possible}) | ({*needed} - names)
    if odd:
        _refuse(f"{what} ({type(module).__name__}) differs in {', '.join(sorted(odd))}")


def _vector(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()


def _refuse(reason: str) -> NoReturn:
    raise BackendUnavailable(f"no native decoder: {reason}")
