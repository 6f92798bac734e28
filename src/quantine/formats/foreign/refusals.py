"""Which layers of a model another engine cannot take, and what comes nearest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from quantine.core.spec import QuantSpec
from quantine.errors import FormatError, PlanError, shown
from quantine.formats.foreign import target_named
from quantine.formats.foreign.engines import (
    VLLM_LAYOUTS,
    split_refusals,
    vllm_model_refusal,
    vllm_refusal,
)
from quantine.formats.foreign.plain import group_text
from quantine.formats.foreign.target import Matrix, Target

ENGINES: Final = {"vllm": VLLM_LAYOUTS}
"""Engines that take less than their layouts hold, with the layouts that they read."""


@dataclass(frozen=True)
class Refused:
    """A layer that an engine cannot take without loss.

    Attributes:
        name: of the layer.
        reason: why not.
        nearest: the grid that comes nearest; ``None`` is floats.
        remains: why not even with every refused layer on its nearest grid; ``None`` if it is taken
            then.
    """

    name: str
    reason: str
    nearest: QuantSpec | None
    remains: str | None = None


def refusals(
    layout: str, engine: str | None, config: Any, matrices: Mapping[str, Matrix]
) -> list[Refused]:
    """The quantized layers of a model that cannot be held without loss, in running order.

    Args:
        layout: a row of `quantine.formats.foreign.FOREIGN`.
        engine: a key of `ENGINES`, whose limits count, too; ``None`` counts the layout's only.
        config: of the model.
        matrices: its quantized layers, by name.

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
    if reason is not None:
        raise FormatError(f"the model cannot be exported: {reason}")
    reasons = _reasons(layout, engine, config, matrices)
    nearest = {name: _nearest(target, engine, matrices[name]) for name in reasons}
    rounded = dict(matrices)
    for name, spec in nearest.items():
        if spec is None:
            del rounded[name]
        else:
            rounded[name] = replace(matrices[name], spec=spec, outliers=False, ordered=False)
    left = _reasons(layout, engine, config, rounded)
    return [
        Refused(name, reasons.get(name) or left[name], nearest.get(name), left.get(name))
        for name in matrices
        if name in reasons or name in left
    ]


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


def _nearest(target: Target, engine: str | None, matrix: Matrix) -> QuantSpec | None:
    """The grid to which a refused matrix is rounded; vLLM takes heads in floats only."""
    return None if engine == "vllm" and matrix.role != "block" else target.nearest(matrix)


def refused_text(layout: str, found: Sequence[Refused]) -> str:
    """What ``found``, at least one, says to users: the first layer, how many more, and a remedy.

    Layers that are refused on their nearest grids, too, come first, as no rounding helps then.
    """
    lasting = [one for one in found if one.remains is not None]
    first = (lasting or found)[0]
    alike = sum(one.reason == first.reason for one in found)
    count = f" (and {alike - 1} like it)" if alike > 1 else ""
    others = len(found) - alike
    more = f"; {others} more for other reasons" if others else ""
    said = f"{first.name}{count} does not fit into layout {layout}: {first.reason}{more}."
    if first.remains is not None:
        why = "" if first.remains == first.reason else f" ({first.remains})"
        return f"{said} Nor does what --nearest rounds to{why}: quantize again"
    near = "16 bit" if first.nearest is None else group_text(first.nearest)
    return f"{said} Nearest that does: {near}, which --nearest rounds to; else quantize again"
