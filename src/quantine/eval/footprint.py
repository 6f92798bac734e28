"""Memory that serving a model takes under a scheme, computed from its configuration alone.

After RPTQ (arXiv 2304.01089, section 4.3): weights, the KV cache, and the temporary activations of
one block. Activations are assumed to be stored at the bits of their site as soon as they are made,
and attention scores are assumed never to be written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from quantine.calibrate.skeleton import skeleton
from quantine.core.activation_spec import FINE_BITS, REORDERS, UNQUANTIZED, ActivationSpec
from quantine.errors import FamilyError, PlanError
from quantine.eval.memory import ELEMENT_BYTES, cache_bytes, head_dim
from quantine.families import family_of
from quantine.families.layers import find_layers
from quantine.plan.shorthand import Shorthand, parse_shorthand
from quantine.source.locate import locate

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OPT: Final[dict[str, tuple[int, int, int]]] = {
    # blocks, width, heads
    "opt-13b": (40, 5120, 40),
    "opt-30b": (48, 7168, 56),
    "opt-66b": (64, 9216, 72),
    "opt-175b": (96, 12288, 96),
}
"""Models known by name, as ``(blocks, width, heads)``, so that nothing has to be downloaded."""
GROUPS: Final = 4
"""Number of groups of matrices in blocks of attention and an MLP."""
SCHEMES: Final = ("W16A16", "W4A16", "W4A8", "W4A4", "W4A4KV", "W4A3KV", "W3A3KV")
"""Schemes that are computed by default; `quantine.plan.shorthand.parse_shorthand` explains them."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory that a model takes while a batch runs through it.

    Attributes:
        scheme: name of the scheme, such as ``"W4A4"``.
        weights: bytes of all weights. Matrices in blocks have the scheme's bits, with a scale in 16
            bit and a zero point for each row and cluster of inputs; the rest is in 16 bit. The
            matrices for error feedback among the channels of heads are included, as if every head
            that may have one did.
        cache: bytes of the keys and values of all tokens.
        temporary: bytes of the activations that are alive at once inside of a block, at most.
    """

    scheme: str
    weights: int
    cache: int
    temporary: int

    @property
    def total(self) -> int:
        """Bytes of weights, cache and temporary activations together."""
        return self.weights + self.cache + self.temporary

    def as_dict(self) -> dict[str, Any]:
        """All attributes and the total by name."""
        return {**vars(self), "total": self.total}


def footprints(
    model: str, batch: int, seqlen: int, schemes: Sequence[str] = SCHEMES
) -> list[Footprint]:
    """The memory that a model takes under each of several schemes.

    Args:
        model: a name in `OPT`, or a model named as for `quantine.source.locate.locate`; no weights
            are read.
        batch: number of sequences that run at once.
        seqlen: number of tokens of each sequence.
        schemes: names as for `quantine.plan.shorthand.parse_shorthand`.

    Raises:
        PlanError: there is no such scheme, or ``batch`` or ``seqlen`` is not positive.
        CheckpointError: there is no such model.
        FamilyError: its architecture is not supported.
    """
    if batch < 1 or seqlen < 1:
        raise PlanError(f"batch and seqlen must be positive, not {batch} and {seqlen}")
    named = [(name, parse_shorthand(name)) for name in schemes]
    config = opt_config(model) if model in OPT else locate(model).config()
    sizes = _Sizes.of(config)
    return [
        Footprint(
            name,
            sizes.weight_bytes(scheme) + _feedback_bytes(config, scheme.activations),
            _cache(config, batch * seqlen, scheme),
            sizes.temporary_bytes(scheme, batch * seqlen),
        )
        for name, scheme in named
    ]


def opt_config(name: str) -> PretrainedConfig:
    """The transformers configuration of the model called ``name`` in `OPT`."""
    from transformers import OPTConfig

    blocks, width, heads = OPT[name]
    return OPTConfig(
        num_hidden_layers=blocks,
        hidden_size=width,
        word_embed_proj_dim=width,
        num_attention_heads=heads,
        ffn_dim=4 * width,
    )


def _cache(config: PretrainedConfig, tokens: int, scheme: Shorthand) -> int:
    spec, floats = scheme.activations, cache_bytes(config, tokens)
    codes = floats * (spec.key + spec.value) // (2 * UNQUANTIZED)
    # A factor of 16 bits for the values of a head, where floats have as many for each channel.
    return codes + (floats // (2 * head_dim(config)) if spec.rotates("value") else 0)


def _feedback_bytes(config: PretrainedConfig, spec: ActivationSpec) -> int:
    """Bytes of the matrices of `quantine.rptq.feedback`, for every head that may have one."""
    if not spec.searches:
        return 0
    dim = head_dim(config)
    blocks = config.num_hidden_layers
    keyed = cache_bytes(config, 1) // (2 * blocks * ELEMENT_BYTES)  # channels of keys
    channels = {"query": config.num_attention_heads * dim, "key": keyed, "value": keyed}
    rounded = sum(count for site, count in channels.items() if getattr(spec, site) < FINE_BITS)
    return int(blocks * rounded * dim * ELEMENT_BYTES)


@dataclass(frozen=True)
class _Sizes:
    """The sizes of a model that its memory depends on.

    Attributes:
        matrices: rows and columns of every matrix in blocks.
        others: number of parameters outside of these matrices.
        width: number of channels of the residual stream.
        attention: number of input channels of attention's output projection.
        hidden: number of input channels of the last matrix of the MLP.
        written: number of channels that the first matrices of the MLP (gate and up) write together.
    """

    matrices: tuple[tuple[int, int], ...]
    others: int
    width: int
    attention: int
    hidden: int
    written: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> _Sizes:
        model, family = skeleton(config), family_of(config)
        layers = [layer for layer in find_layers(model, family) if layer.role == "block"]
        first = [layer for layer in layers if layer.block == 0]
        if len(family.groups_in(0)) != GROUPS:
            raise FamilyError(
                f"the memory of {config.model_type} models cannot be computed: their blocks do not "
                "consist of attention and an MLP of one hidden layer"
            )
        inputs = {layer.group: layer.in_features for layer in first}
        outputs = [sum(x.out_features for x in first if x.group == group) for group in inputs]
        whole = sum(parameter.numel() for parameter in model.parameters())
        return cls(
            tuple((layer.out_features, layer.in_features) for layer in layers),
            whole - sum(layer.weights for layer in layers),
            inputs[0],
            inputs[1],
            inputs[3],
            outputs[2],
        )

    def weight_bytes(self, scheme: Shorthand) -> int:
        bits = sum(rows * columns for rows, columns in self.matrices) * scheme.weight_bits
        if scheme.weight_bits != UNQUANTIZED:
            read = [kind for kind in REORDERS if kind != "R2"]  # no matrix reads queries and keys
            clusters = max(scheme.activations.clusters_of(kind) for kind in read)
            bits += sum(rows for rows, _ in self.matrices) * clusters * (16 + scheme.weight_bits)
        return bits // 8 + self.others * ELEMENT_BYTES

    def temporary_bytes(self, scheme: Shorthand, tokens: int) -> int:
        """Bytes of the largest set of activations that are alive at once inside of a block.

        Keys and values count as cache. The residual stream stays in 16 bit all along.

        Args:
            scheme: bits of every site.
            tokens: number of tokens of all sequences together.
        """
        spec, stream = scheme.activations, self.width * UNQUANTIZED
        normed, hidden = self.width * spec.norm, self.hidden * spec.hidden
        gate = (self.written - self.hidden) * spec.hidden
        alive = (
            normed + self.attention * spec.query,
            self.attention * (spec.query + spec.attention),
            self.attention * spec.attention + stream,
            normed + hidden + gate,
            hidden + stream,
        )
        return tokens * (stream + max(alive)) // 8
