"""What engines refuse of layouts that hold more: facts of their versions, not of the layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from quantine.families import described_family, is_described
from quantine.formats.foreign.target import Matrix

VLLM_GROUPS: Final = (-1, 32, 64, 128)
"""Group sizes for which vLLM 0.32 has kernels on GPUs."""
VLLM_LAYOUTS: Final = ("gptq", "compressed-tensors")
"""Layouts that vLLM 0.32 reads by itself."""
VLLM_UNSERVED: Final = {
    "gpt_neox": "answers otherwise than transformers do, quantized or not",
}
"""Model types that vLLM 0.32 itself computes wrongly, and what it does."""


def vllm_model_refusal(config: Any) -> str | None:
    """Why no model of this type is to be served by vLLM 0.32; ``None`` if it may be."""
    kind = config.model_type
    if kind in VLLM_UNSERVED:
        return f"vLLM's own model of type {kind} {VLLM_UNSERVED[kind]}"
    if not is_described(kind):
        return (
            f"which layers vLLM computes in one product is known only of model types that are "
            f"described (docs/adding.md), and {kind} is not: leave out --target vllm"
        )
    return None


def vllm_refusal(layout: str, matrix: Matrix) -> str | None:
    """Why vLLM 0.32 does not serve a matrix that ``layout`` holds; ``None`` if it does.

    Its CPU has kernels for 4 bits only; that is not refused here, as GPUs have more.
    """
    spec = matrix.spec
    if matrix.ordered and spec.group_size != -1:
        return "vLLM 0.32 reads no order of columns (g_idx): solve with groups: static"
    if spec.bits not in {4, 8}:
        return f"vLLM 0.32 has kernels for 4 and 8 bits, not {spec.bits}"
    if not spec.sym and (layout == "gptq" or spec.bits == 8):
        return f"vLLM 0.32 serves {spec.bits} bits in layout {layout} only with sym: true"
    if spec.group_size not in VLLM_GROUPS and spec.group_size != matrix.in_features:
        sizes = ", ".join(map(str, VLLM_GROUPS))
        return f"vLLM 0.32 has kernels for groups of {sizes}, not {spec.group_size}"
    if matrix.out_features % 32 or matrix.in_features % 32:
        return "vLLM 0.32 needs shapes that are multiples of 32"
    if matrix.role != "block":
        return f"vLLM 0.32 is given the {matrix.role} in floats"
    return None


def split_refusals(model_type: str, matrices: Mapping[str, Matrix]) -> dict[str, str]:
    """Why layers cannot be served that vLLM computes as one (q, k and v; gate and up), by name.

    Such layers must have one scheme, or all be float.
    """
    family = described_family(model_type)
    refused: dict[str, str] = {}
    for name, matrix in matrices.items():
        number, _, path = name.removeprefix(f"{family.blocks}.").partition(".")
        if matrix.role != "block" or not number.isdigit():
            continue
        group = next((g for g in family.groups_in(int(number)) if path in g), ())
        for other in group:
            sibling = matrices.get(f"{family.blocks}.{number}.{other}")
            if sibling is None or sibling.spec != matrix.spec:
                refused[name] = f"vLLM computes it in one product with {other}: give both a scheme"
    return refused
