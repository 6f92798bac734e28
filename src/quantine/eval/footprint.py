"""Memory that serving a model takes under a scheme, from its configuration alone.

After RPTQ (arXiv 2304.01089, section 4.3): weights, the cache of keys and values, and the temporary
activations of one block. Every value is taken to be stored at the bits of its site as soon as it is
made, and attention scores are never written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from quantine.calibrate.skeleton import skeleton
from quantine.core.activation_spec import FINE_BITS, REORDERS, UNQUANTIZED, ActivationSpec
from quantine.errors import PlanError
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
"""Models that are known by name, so that nothing has to be downloaded."""
SCHEMES: Final = ("W16A16", "W4A16", "W4A8", "W4A4", "W4A4KV", "W4A3KV", "W3A3KV")


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model takes while a batch runs through it.

    Attributes:
        scheme: its name.
        weights: all weights; matrices in blocks at the scheme's bits, with a 16 bit scale and a
            zero point for each row and cluster of inputs, the rest in 16 bit; and what rounding in
            turn needs, as if every head of every block did.
        cache: keys and values of all tokens.
        temporary: the most that is alive at once inside of a block.
    """

    scheme: str
    weights: int
    cache: int
    temporary: int

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.cache + self.temporary

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "total": self.total}


def footprints(
    model: str, batch: int, seqlen: int, schemes: Sequence[str] = SCHEMES
) -> list[Footprint]:
    """What ``model`` takes with ``batch`` sequences of ``seqlen`` tokens, for each scheme.

    Args:
        model: a name in `OPT`, or as of `quantine.runtime.source.locate`; no weights are read.

    Raises:
        PlanError: a scheme, ``batch`` or ``seqlen`` is none.
        CheckpointError, FamilyError: the model is not there, or not covered.
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
    """The configuration of a model in `OPT`."""
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
    spec = scheme.activations
    return cache_bytes(config, tokens) * (spec.key + spec.value) // (2 * UNQUANTIZED)


def _feedback_bytes(config: PretrainedConfig, spec: ActivationSpec) -> int:
    """Bytes of feedback (`quantine.rptq.feedback`) of every head that may be rounded with it."""
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
    """Numbers of a model.

    Attributes:
        matrices: rows and columns of every matrix in blocks.
        others: numbers in everything else.
        width, attention, hidden: channels of the residual stream, of what attention puts out, and
            of the MLP, whose first matrices write ``written`` channels.
    """

    matrices: tuple[tuple[int, int], ...]
    others: int
    width: int
    attention: int
    hidden: int
    written: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> _Sizes:
        model, family = skeleton(config), family_of(config.model_type)
        layers = [layer for layer in find_layers(model, family) if layer.role == "block"]
        first = [layer for layer in layers if layer.block == 0]
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
        """Bytes of the largest set of values that live at once; keys and values are in the cache.

        The residual stream stays in 16 bit all along.
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
