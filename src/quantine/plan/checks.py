"""Checks that a plan can be carried out on a model, made before any work starts."""

from __future__ import annotations

from collections.abc import Sequence

from quantine.core.spec import nearest_group_sizes
from quantine.errors import PlanError, cut
from quantine.plan.decision import Decision


def check_groups(decisions: Sequence[Decision]) -> None:
    """Check that the groups of every layer divide its lines evenly.

    Args:
        decisions: one per layer of the model.

    Raises:
        PlanError: some do not; the message lists all such layers, with group sizes that would.
    """
    refused: dict[tuple[int, int, str], list[str]] = {}
    for decision in decisions:
        layer, scheme = decision.layer, decision.scheme
        if scheme is not None and not scheme.tiles(layer):
            spec = scheme.spec
            length = spec.lines(layer.out_features, layer.in_features)[1]
            key = (spec.group_size, length, f"{spec.group_axis}puts")
            refused.setdefault(key, []).append(layer.name)
    if not refused:
        return
    lines = []
    for (group_size, length, kind), names in refused.items():
        sizes = ", ".join(map(str, nearest_group_sizes(length, group_size)))
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lines.append(
            f"  group size {cut(group_size, 20)} does not divide {length} {kind} of {shown}; "
            f"nearest sizes that do: {sizes}, or -1 for all of them"
        )
    raise PlanError("groups must tile the lines of a layer:\n" + "\n".join(lines))


def check_scheme(decision: Decision) -> None:
    """Check that the method and the format of one layer can do what the plan asks of them.

    Args:
        decision: what the plan does with the layer.

    Raises:
        PlanError: they cannot; the message names the layer and the remedy.
    """
    layer, scheme = decision.layer, decision.scheme
    if scheme is not None and layer.role != "block" and decision.needs_inputs:
        raise PlanError(
            f"{layer.name} ({layer.role}) can be quantized only by methods that need no inputs, "
            f"not by {decision.method}: use method rtn in the rule that matches it "
            f"({decision.reason})"
        )
    for one in decision.choices or ((scheme,) if scheme else ()):
        reason = one.layout.refusal(one.spec, layer.out_features, layer.in_features)
        if reason is not None:
            raise PlanError(f"{layer.name}: {reason} ({decision.reason})")


def check_exclusive(decisions: Sequence[Decision], rounds_activations: bool) -> None:
    """Check that layers in a format for other programs are the only kind of quantized layer.

    Args:
        decisions: one per layer of the model.
        rounds_activations: whether the plan asks for rounded activations.

    Raises:
        PlanError: a layer has another format, or is one that the exclusive format cannot describe;
            or activations are rounded, of which readers of such a directory would not know.
    """
    chosen = [(d.layer, d.scheme) for d in decisions if d.scheme is not None]
    first = next(((layer, one) for layer, one in chosen if one.layout.exclusive), None)
    if first is None:
        return
    name, layout = first[1].format, first[1].layout
    if rounds_activations:
        raise PlanError(
            f"{first[0].name} has format {name!r}, whose other readers know nothing of rounded "
            "activations: use format sparse, or leave out `activations` and `scheme`"
        )
    for layer, scheme in chosen:
        if scheme.format != name:
            raise PlanError(
                f"{layer.name} has format {scheme.format!r}, but {first[0].name} has {name!r}, "
                f"whose directories hold nothing else: give every quantized layer format {name!r}, "
                "or none"
            )
        if layout.linears_only and (layer.role != "block" or layer.transposed):
            kind = "a Conv1D" if layer.transposed else f"the {layer.role}"
            raise PlanError(
                f"{layer.name} is {kind}, but format {name!r} holds only Linear layers inside of "
                "blocks: use format sparse, or keep this layer"
            )
