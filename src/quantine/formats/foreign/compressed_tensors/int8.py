"""Format ``int-quantized``: int8 weights for each output, and inputs that are rounded to int8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from quantine.core.activation_spec import (
    INPUT_SITES,
    SITES,
    SITES_WITH_FACTORS,
    UNQUANTIZED,
    ActivationSpec,
)
from quantine.core.spec import WHOLE_ROW, QuantSpec
from quantine.errors import FormatError
from quantine.formats.foreign.plain import Plain
from quantine.formats.foreign.target import Matrix

FORMAT: Final = "int-quantized"
"""The format's name."""
BITS: Final = 8
"""Of weights and of activations."""
MIDDLE: Final = 2 ** (BITS - 1)
"""What a code of quantine's is more than the signed one that stands for it here."""
SPEC: Final = QuantSpec(BITS, WHOLE_ROW, sym=True)
"""The one grid of weights."""
OVERFLOW: Final = (
    "on x86 processors without VNNI vLLM multiplies int8 by int8 with sums that overflow 16 bits: "
    "serve it on a GPU or a processor with VNNI"
)
"""What users of such files have to know."""


def activations_refusal(activations: ActivationSpec) -> str | None:
    """Why activations are not rounded as this format can say; ``None`` if they are.

    It knows one grid for each token, from its smallest to its largest value, and one static grid
    for all tokens and channels.
    """
    bits = {site: getattr(activations, site) for site in SITES}
    wrong = [site for site in INPUT_SITES if bits[site] != BITS]
    if wrong:
        return f"int8 files round inputs of all matrices to 8 bits: set {wrong[0]}: 8"
    others = [site for site in SITES if site not in INPUT_SITES and bits[site] != UNQUANTIZED]
    if others:
        return f"int8 files round inputs of matrices only: set {others[0]}: 16"
    if activations.granularity == "cluster":
        return "int8 files have one grid for all channels: set granularity: token or tensor"
    factors = activations.token_factors and activations.range == "search"
    if activations.granularity == "tensor" and factors:
        sites = " and ".join(SITES_WITH_FACTORS)
        return f"static grids of {sites} have factors of tokens: set token_factors: false"
    return None


def matrix_refusal(matrix: Matrix) -> str | None:
    """Why a matrix is not on `SPEC`, or its input is not rounded; ``None`` if both is so."""
    spec = matrix.spec
    if matrix.role != "block":
        return f"int8 files round the input of every matrix, but not that of the {matrix.role}"
    if (
        spec.bits != BITS
        or not spec.sym
        or spec.group_length(matrix.in_features) != (matrix.in_features)
    ):
        return "int8 files have 8 bits with sym: true and group_size: -1"
    return None


def input_settings(activations: ActivationSpec) -> dict[str, Any]:
    """The field ``input_activations`` of ``quantization_config``."""
    dynamic = activations.granularity == "token"
    return {
        "num_bits": BITS,
        "type": "int",
        "symmetric": False,
        "strategy": "token" if dynamic else "tensor",
        "dynamic": dynamic,
    }


def pack_int8(matrix: Plain) -> dict[str, Tensor]:
    """The tensors of a matrix on `SPEC`: ``weight`` int8 ``[out, in]``, ``weight_scale`` float32.

    Scales are ``[out, 1]``.
    """
    weight = (matrix.codes.to(torch.int16) - MIDDLE).to(torch.int8)
    return {"weight": weight, "weight_scale": matrix.scale.float()}


def pack_inputs(name: str, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The static grid of the input of layer ``name``, if it has one.

    Args:
        grid: tensors of its `quantine.activations.grids.StaticGrid`, by name; empty for inputs
            whose grids are found while the model runs.

    Returns:
        ``input_scale`` float32 and ``input_zero_point`` int8, ``[1]`` each; or nothing.

    Raises:
        FormatError: the grid does not hold zero, so that the zero point is no int8.
    """
    if not grid:
        return {}
    zero = grid["zero"] - MIDDLE
    if not bool(((zero >= -MIDDLE) & (zero < MIDDLE)).all()):
        raise FormatError(
            f"inputs of {name} are rounded in a range without zero, which int8 files do not hold: "
            "quantize with granularity: token"
        )
    return {"input_scale": grid["scale"], "input_zero_point": zero.to(torch.int8)}
