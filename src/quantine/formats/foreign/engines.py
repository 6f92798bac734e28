"""What engines refuse of layouts that hold more: facts of their versions, not of the layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch

from quantine.core.spec import QuantSpec
from quantine.families import described_family, is_described
from quantine.families.layers import Role
from quantine.formats.foreign.target import Matrix

VLLM_GROUPS: Final = (-1, 32, 64, 128)
"""Group sizes for which vLLM 0.32 has kernels on GPUs."""
VLLM_LAYOUTS: Final = ("gptq", "compressed-tensors")
"""Layouts that vLLM 0.32 reads by itself."""
VLLM_DTYPES: Final = {"gptq": (torch.float16, torch.bfloat16)}
"""Dtypes in which vLLM 0.32 computes with files of a layout, where these are not all."""
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


def vllm_dtype_refusal(layout: str, dtype: torch.dtype | None) -> str | None:
    """Why vLLM 0.32 computes with no files of ``layout`` in ``dtype``; ``None`` if it does."""
    taken = VLLM_DTYPES.get(layout)
    if dtype is None or taken is None or dtype in taken:
        return None
    given, *names = (str(one).removeprefix("torch.") for one in (dtype, *taken))
    return (
        f"vLLM 0.32 computes with layout {layout} in {' or '.join(names)}, not {given}: give one "
        "of these, or leave --dtype out"
    )


def vllm_refusal(layout: str, matrix: Matrix) -> str | None:
    """Why vLLM 0.32 does not serve a matrix that ``layout`` holds; ``None`` if it does.

    Its CPU has kernels for 4 bits only; that is not refused here, as GPUs have more.
    """
    spec = matrix.spec
    if matrix.out_features % 32 or matrix.in_features % 32:  # first, as no other grid mends it
        return "vLLM 0.32 needs shapes that are multiples of 32"
    if matrix.ordered and spec.group_size != -1:
        return "vLLM 0.32 reads no order of columns (g_idx): solve with groups: static"
    if spec.bits not in {4, 8}:
        return f"vLLM 0.32 has kernels for 4 and 8 bits, not {spec.bits}"
    if not spec.sym and (layout == "gptq" or spec.bits == 8):
        return f"vLLM 0.32 serves {spec.bits} bits in layout {layout} only with sym: true"
    if spec.group_size not in VLLM_GROUPS and spec.group_size != matrix.in_features:
        sizes = ", ".join(map(str, VLLM_GROUPS))
        return f"vLLM 0.32 has kernels for groups of {sizes}, not {spec.group_size}"
    if matrix.role != "block":
        return f"vLLM 0.32 is given the {matrix.role} in floats"
    return None


def vllm_nearest(
    layout: str,
    model_type: str,
    matrices: Mapping[str, Matrix],
    wanted: Mapping[str, QuantSpec | None],
) -> dict[str, QuantSpec | None]:
    """Grids that vLLM 0.32 serves, for refused matrices and those it multiplies with them.

    Args:
        layout: that vLLM reads.
        model_type: of the model.
        matrices: the quantized ones, by name.
        wanted: grids of the layout nearest to the refused ones, by name; ``None`` is floats.

    Returns:
        The grid of each matrix that has to change, by name; ``None`` is floats, for what vLLM does
        not serve on any grid.
    """
    found = {name: _served(layout, [matrices[name]], [spec]) for name, spec in wanted.items()}
    for name in list(found):
        names = (name, *_multiplied_with(model_type, name, matrices[name].role))
        members = [matrices[one] for one in names if one in matrices]
        specs = [found.get(one.name, one.spec) for one in members]
        whole = len(members) == len(names)
        joint = _served(layout, members, specs) if whole else None
        found |= {one.name: joint for one in members if one.name in found or joint != one.spec}
    return found


def _served(
    layout: str, matrices: Sequence[Matrix], specs: Sequence[QuantSpec | None]
) -> QuantSpec | None:
    """The one grid for ``matrices`` that vLLM serves: as many bits, and groups as small if it can.

    ``None``, which is floats, where it can be none, or one of ``specs`` is.
    """
    given = [spec for spec in specs if spec is not None]
    width = matrices[0].in_features
    shapes = [size % 32 for one in matrices for size in (one.out_features, one.in_features)]
    if any(shapes) or len(given) < len(specs) or any(one.role != "block" for one in matrices):
        return None
    bits = 4 if all(spec.bits <= 4 for spec in given) else 8
    size = min(width if spec.group_size == -1 else spec.group_size for spec in given)
    if size == width:
        size = -1
    elif size not in VLLM_GROUPS:
        size = max([n for n in VLLM_GROUPS if 0 < n <= size and width % n == 0], default=32)
    sym = all(spec.sym for spec in given) or layout == "gptq" or bits == 8
    return replace(given[0], bits=bits, group_size=size, sym=sym)


def split_refusals(model_type: str, matrices: Mapping[str, Matrix]) -> dict[str, str]:
    """Why layers cannot be served that vLLM computes as one (q, k and v; gate and up), by name.

    Such layers must have one scheme, or all be float.
    """
    refused: dict[str, str] = {}
    for name, matrix in matrices.items():
        for other in _multiplied_with(model_type, name, matrix.role):
            sibling = matrices.get(other)
            if sibling is None or sibling.spec != matrix.spec:
                path = other.removeprefix(f"{described_family(model_type).blocks}.")
                within = path.partition(".")[2]
                refused[name] = f"vLLM computes it in one product with {within}: give both a scheme"
    return refused


def _multiplied_with(model_type: str, name: str, role: Role) -> list[str]:
    """Names of the other matrices that vLLM computes in one product with ``name``."""
    family = described_family(model_type)
    number, _, path = name.removeprefix(f"{family.blocks}.").partition(".")
    if role != "block" or not number.isdigit():
        return []
    group = next((g for g in family.groups_in(int(number)) if path in g), ())
    return [f"{family.blocks}.{number}.{other}" for other in group if other != path]
