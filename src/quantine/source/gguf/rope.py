"""How a GGUF file scales rotary embeddings, in the words of transformers.

llama.cpp divides positions (``linear``), mixes that with the unscaled frequencies (``yarn``), or
divides each frequency by a factor of its own, which a tensor holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from quantine.errors import CheckpointError
from quantine.source.gguf.header import GGUFTensor
from quantine.source.gguf.metadata import Metadata

FREQUENCIES: Final = "rope_freqs.weight"
"""Name of the tensor with the factors of all frequencies."""
LLAMA3: Final = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What llama 3.1, 3.2 and 3.3 make their factors of, beside the largest of them."""
YARN: Final = {"beta_fast": 32.0, "beta_slow": 1.0}
"""Where the ramp of yarn begins and ends, if nothing else is said."""
TOLERANCE: Final = 1e-4
"""Largest relative difference to factors that llama.cpp computed, in float32, from a config."""


def scaled_rope(metadata: Metadata, context: int) -> dict[str, Any]:
    """Take the scaling of rotary embeddings out of metadata.

    Args:
        metadata: of the architecture.
        context: number of tokens that the model may get.

    Returns:
        The fields of ``rope_parameters`` in ``config.json``, without ``rope_theta``.

    Raises:
        CheckpointError: the scaling is of another kind than ``linear`` and ``yarn``.
    """
    metadata.rest.pop("rope.scaling.finetuned", None)  # says only where the scaling comes from
    old = metadata.number("rope.scale_linear", 1.0)
    factor = metadata.number("rope.scaling.factor", old)
    kind = metadata.text("rope.scaling.type", "linear")
    if kind != "yarn":
        metadata.rest.pop("rope.scaling.original_context_length", None)  # which only yarn reads
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    if kind != "yarn":
        raise CheckpointError(
            f"{metadata.path} scales rotary embeddings by {kind[:20]!r}, which is not understood: "
            "quantize the model that the GGUF file was made from"
        )
    # llama.cpp multiplies this by a term for the factor; transformers wants the product.
    attention = metadata.number("rope.scaling.attn_factor", 1.0)
    return {
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": metadata.count(
            "rope.scaling.original_context_length", context
        ),
        "attention_factor": attention * yarn_attention(factor),
        "beta_fast": float(metadata.number("rope.scaling.yarn_beta_fast", YARN["beta_fast"])),
        "beta_slow": float(metadata.number("rope.scaling.yarn_beta_slow", YARN["beta_slow"])),
    }


def yarn_attention(factor: float) -> float:
    """By what yarn multiplies queries and keys where positions are scaled by ``factor``."""
    return 0.1 * math.log(max(factor, 1.0)) + 1.0


def yarn_as_meant(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The ``rope_parameters`` of yarn with what is meant by the fields that are left out.

    Where ``mscale`` or ``factor`` leave it to other rules, ``attention_factor`` stays out.
    """
    meant: dict[str, Any] = dict(YARN)
    if rope.get("factor") is not None and not rope.get("mscale"):
        meant["attention_factor"] = yarn_attention(rope["factor"])
    said = {key: value for key, value in rope.items() if value is not None}
    if said.get("truncate") is True:
        del said["truncate"]
    return meant | said


def frequency_factors(tensor: GGUFTensor, theta: float) -> dict[str, Any]:
    """The config from which the factors of all frequencies were computed.

    Args:
        tensor: the factors, one for each pair of channels of a head.
        theta: base of the rotary embeddings.

    Returns:
        The fields of ``rope_parameters`` in ``config.json``, without ``rope_theta``.

    Raises:
        CheckpointError: they were computed from other values than `LLAMA3`.
    """
    data = tensor.read()
    if len(data) != 4 * math.prod(tensor.shape) or len(tensor.shape) != 1 or not data:
        raise CheckpointError(f"{tensor.name} in {tensor.file} is not a list of float32 numbers")
    factors = torch.frombuffer(bytearray(data), dtype=torch.float32).tolist()
    if all(factor == 1.0 for factor in factors):
        return {"rope_type": "default"}
    if not all(0 < factor < math.inf for factor in factors):
        raise CheckpointError(f"{tensor.name} in {tensor.file} holds what is no factor: damaged")
    if not _close(factors, llama3_factors(max(factors), len(factors), theta)):
        raise CheckpointError(
            f"{tensor.name} in {tensor.file} scales rotary embeddings in a way that is not "
            "understood: quantize the model that the GGUF file was made from"
        )
    return {"rope_type": "llama3", "factor": max(factors), **LLAMA3}


def llama3_factors(factor: float, count: int, theta: float) -> list[float]:
    """The factors of ``count`` frequencies for which a config of type ``llama3`` stands."""
    low, high, context = LLAMA3.values()
    factors = []
    for index in range(count):
        turns = context / (2 * math.pi * theta ** (index / count))
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - share) / factor + share))
    return factors


def _close(found: Sequence[float], expected: Sequence[float]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(math.isclose(one, other, rel_tol=TOLERANCE) for one, other in pairs)
