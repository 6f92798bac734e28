"""Which layers of a model another engine cannot take, and what comes nearest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from quantine.core.activation_spec import ActivationSpec
from quantine.core.spec import QuantSpec
from quantine.errors import FormatError, PlanError, shown
from quantine.families import described_family, is_described
from quantine.families.layers import Role
from quantine.formats.foreign import target_named
from quantine.formats.foreign.engines import (
    VLLM_LAYOUTS,
    split_refusals,
    vllm_model_refusal,
    vllm_nearest,
    vllm_refusal,
)
from quantine.formats.foreign.plain import group_text
from quantine.formats.foreign.target import Matrix

ENGINES: Final = {"vllm": VLLM_LAYOUTS}
"""Engines that take less than their layouts hold, with the layouts that they read."""
ALIKE: Final = "vLLM computes it in one product with matrices that are refused"
"""Why a matrix that fits has to change, too."""


@dataclass(frozen=True)
class Refused:
    """A layer that an engine cannot take without loss.

    Attributes:
        name: of the layer.
        reason: why not.
        nearest: the grid that comes nearest; ``None`` is floats.
    """

    name: str
    reason: str
    nearest: QuantSpec | None


def refusals(
    layout: str,
    engine: str | None,
    config: Any,
    matrices: Mapping[str, Matrix],
    activations: ActivationSpec | None = None,
    floats: Sequence[str] = (),
) -> list[Refused]:
    """The quantized layers of a model that cannot be held without loss, in running order.

    Args:
        layout: a row of `quantine.formats.foreign.FOREIGN`.
        engine: a key of `ENGINES`, whose limits count, too; ``None`` counts the layout's only.
        config: of the model.
        matrices: its quantized layers, by name.
        activations: how they are rounded; ``None`` where they are not.
        floats: names of the matrices in its blocks that are not quantized.

    Raises:
        PlanError: there is no such layout or engine, or the engine does not read the layout.
        FormatError: no model of this kind can be held.
    """
    target = target_named(layout)
    if engine is not None and engine not in ENGINES:
        raise PlanError(f"there is no target {shown(engine)}: give one of {', '.join(ENGINES)}")
    if engine is not None and layout not in ENGINES[engine]:
        readable = " and ".join(ENGINES[engine])
        raise PlanError(f"{engine} does not read layout {layout}, but {readable}")
    reason = target.model_refusal(config)
    if reason is None and engine == "vllm":
        reason = vllm_model_refusal(config)
    if reason is None and activations is not None:
        reason = target.activations_refusal(activations)
        if reason is None and floats:
            reason = f"{floats[0]} is kept in floats, but its input is rounded"
        left = [one.name for one in matrices.values() if one.role == "block" and not one.rounded]
        if reason is None and left:
            reason = (
                f"the input of {left[0]} is not known to be rounded, but layout {layout} rounds "
                "all of them"
            )
    if reason is not None:
        raise FormatError(f"the model cannot be exported: {reason}")
    reasons = _reasons(layout, engine, config, matrices)
    nearest = {name: target.nearest(matrices[name]) for name in reasons}
    if engine == "vllm":
        nearest = vllm_nearest(layout, config.model_type, matrices, nearest)
    return [
        Refused(name, reasons.get(name, ALIKE), nearest[name])
        for name in matrices
        if name in nearest
    ]


def check_quantized(layout: str, matrices: Mapping[str, Matrix], found: Sequence[Refused]) -> None:
    """Refuse an export to the nearest grids in which no matrix would be quantized any more.

    Args:
        layout: a row of `quantine.formats.foreign.FOREIGN`.
        matrices: the model's quantized layers, by name.
        found: those of them that are refused.

    Raises:
        FormatError: files of the layout must hold a quantized matrix, and none would be left.
    """
    floats = [one for one in found if one.nearest is None]
    if not target_named(layout).needs_quantized or len(floats) < len(matrices):
        return
    why = ""
    if floats:
        name, reason = floats[0].name, floats[0].reason
        why = f", as {name} and all others become floats ({reason})"
    raise FormatError(
        f"nothing would be quantized in layout {layout}{why}: export --to float, or choose another "
        "target, layout or group size"
    )


def is_rounded(role: Role, activations: ActivationSpec | None, config: Any, gridded: bool) -> bool:
    """What `Matrix.rounded` is of a matrix.

    Args:
        role: of its layer.
        activations: how the model rounds them.
        config: of the model.
        gridded: whether its input has a static grid, where inputs have any.
    """
    if activations is None or role != "block":
        return activations is not None
    if activations.granularity != "token":
        return gridded
    # Nothing is stored of these. Where links are derived from the model, inputs may be left alone.
    kind = config.model_type
    return is_described(kind) and bool(described_family(kind).links)


def _reasons(
    layout: str, engine: str | None, config: Any, matrices: Mapping[str, Matrix]
) -> dict[str, str]:
    """Why layers cannot be held, by the names of those that cannot, in running order."""
    target = target_named(layout)
    split = split_refusals(config.model_type, matrices) if engine == "vllm" else {}
    found = {}
    for name, matrix in matrices.items():
        reason = target.refusal(matrix)
        if reason is None and engine == "vllm":
            reason = vllm_refusal(layout, matrix) or split.get(name)
        if reason is not None:
            found[name] = reason
    return found


def refused_text(layout: str, found: Sequence[Refused]) -> str:
    """What ``found``, at least one, says to users: the first layer, how many more, and a remedy."""
    first = found[0]
    alike = sum(one.reason == first.reason for one in found)
    count = f" (and {alike - 1} like it)" if alike > 1 else ""
    others = len(found) - alike
    more = f"; {others} more for other reasons" if others else ""
    said = f"{first.name}{count} does not fit into layout {layout}: {first.reason}{more}."
    near = "16 bit" if first.nearest is None else group_text(first.nearest)
    return f"{said} Nearest that does: {near}, which --nearest rounds to; else quantize again"
