"""Short names for the bits of weights and activations, such as ``W4A8`` or ``W4A4KV``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from quantine.core.activation_spec import (
    DEFAULT_CLUSTERS,
    FINE_BITS,
    INPUT_SITES,
    PER_CHANNEL,
    ROTATABLE,
    UNQUANTIZED,
    ActivationSpec,
    Granularity,
)
from quantine.core.spec import MAX_BITS, MIN_BITS
from quantine.errors import PlanError, shown

NAME: Final = re.compile(r"W([1-9]\d*)A([1-9]\d*)(KV)?((?:-[a-z]+)*)")
"""Pattern of such names: bits of weights, bits of activations, ``KV``, suffixes."""


PUBLISHED_CLUSTERS: Final = (32, 4, 4, 32, 32)
"""Numbers of clusters for the reorders R1 to R5 in RPTQ's experiments."""


KEPT_AT_8: Final = 8
"""Least number of bits of norm outputs and softmax, as in RPTQ's published code."""


@dataclass(frozen=True)
class Shorthand:
    """What a name such as ``W4A8`` or ``W4A4KV-faithful`` stands for.

    Attributes:
        weight_bits: number of bits of weights, 2 to 8, or 16 for none.
        activations: how activations are quantized; all sites have 16 bits in a name like ``W4A16``.
        faithful: whether weights, too, are rounded as in RPTQ's published code.
    """

    weight_bits: int
    activations: ActivationSpec
    faithful: bool


VARIANTS: Final = ("centred", "faithful", "mixed", "rotated", "strict", "tensor", "token")
"""Suffixes of such names, explained in `parse_shorthand`."""


def parse_shorthand(name: str) -> Shorthand:
    """Read a name ``W<bits>A<bits>``, with ``KV`` if only keys and values are rounded.

    Norm outputs and softmax keep at least 8 bits, as in the paper's experiments. Suffixes change
    the defaults: ``-strict`` rounds norm outputs to the scheme's bits, too; ``-faithful`` finds
    clusters and grids, and rounds probabilities, as in RPTQ's published code; ``-tensor`` and
    ``-token`` use one grid per tensor or per token; ``-rotated`` rotates values and the inputs
    of matrices that have fewer than 8 bits; ``-mixed`` gives channels of keys different numbers of
    bits; ``-centred`` rounds keys less a centre that turns as rotary embeddings do.

    Raises:
        PlanError: the name does not have this form, or bits are out of range.
    """
    match = NAME.fullmatch(name)
    suffixes = match[4].split("-")[1:] if match else []
    if match is None or not set(suffixes) <= set(VARIANTS) or {"tensor", "token"} <= set(suffixes):
        raise PlanError(
            f"scheme must be like W4A8, W4A4 or W4A4KV, perhaps with -{', -'.join(VARIANTS)}, not "
            f"{shown(name)}"
        )
    if "rotated" in suffixes and {"tensor", "token"} & set(suffixes):
        raise PlanError(
            f"scheme {name}: rotated inputs have grids of clusters: leave out -rotated, or -tensor "
            "and -token"
        )
    weight_bits, bits, only_kv = int(match[1]), int(match[2]), bool(match[3])
    if not (MIN_BITS <= weight_bits <= MAX_BITS or weight_bits == UNQUANTIZED):
        raise PlanError(f"scheme {name}: weights have {MIN_BITS} to {MAX_BITS} bits, or 16")
    kept = bits if bits == UNQUANTIZED else max(bits, KEPT_AT_8)
    others = UNQUANTIZED if only_kv else bits
    granularity: Granularity = "cluster"
    if "tensor" in suffixes:
        granularity = "tensor"
    if "token" in suffixes:
        granularity = "token"
    spec = ActivationSpec(
        norm=UNQUANTIZED if only_kv else bits if "strict" in suffixes else kept,
        query=others,
        key=bits,
        value=bits,
        attention=others,
        hidden=others,
        softmax=UNQUANTIZED if only_kv else kept,
        relative="faithful" not in suffixes,
        granularity=granularity,
        range="running" if "faithful" in suffixes else "search",
        clusters=PUBLISHED_CLUSTERS if "faithful" in suffixes else DEFAULT_CLUSTERS,
        value_clusters=None if "faithful" in suffixes else PER_CHANNEL,
        token_factors="faithful" not in suffixes,
    )
    if "rotated" in suffixes:
        able = INPUT_SITES if "faithful" in suffixes else ROTATABLE
        coarse = tuple(site for site in able if getattr(spec, site) < FINE_BITS)
        if not coarse:
            raise PlanError(
                f"scheme {name}: neither values nor inputs of matrices have fewer than {FINE_BITS} "
                "bits, so there is nothing to rotate: leave out -rotated"
            )
        spec = replace(spec, rotated=coarse)
    try:
        if "mixed" in suffixes:
            spec = replace(spec, mixed_keys=True)
        if "centred" in suffixes:
            spec = replace(spec, centred_keys=True)
    except PlanError as error:
        raise PlanError(f"scheme {name}: {error}") from error
    return Shorthand(weight_bits, spec, "faithful" in suffixes)
