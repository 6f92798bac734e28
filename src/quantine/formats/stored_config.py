"""The ``quantization_config`` of a directory, checked before anything trusts it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from quantine.core.activation_spec import activations_from
from quantine.core.arithmetic import ARITHMETICS, UNSTATED, is_arithmetic
from quantine.core.spec import QuantSpec
from quantine.errors import FormatError, PlanError, cut, shown
from quantine.formats import format_named
from quantine.formats.description import FORMAT_VERSION
from quantine.formats.layout import check_groups

BLOCKED: Final = ("signed", "minimum", "stat_axis")
"""Fields of a spec that schemes have where they are not the default."""


def check_description(found: Mapping[str, Any]) -> None:
    """Refuse a description that docs/format.md does not allow.

    Args:
        found: with ``format_version``, ``schemes``, ``layers``, and perhaps ``arithmetic`` and
            ``activations``.

    Raises:
        FormatError: names the layer or field.
    """
    version, schemes, layers = (found.get(k) for k in ("format_version", "schemes", "layers"))
    if type(version) is not int or version < 1:
        raise FormatError(f"format_version must be a positive number, not {shown(version)}")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"written in format version {cut(version)}, but this quantine reads {FORMAT_VERSION}: "
            "install a newer one"
        )
    if not isinstance(schemes, list) or not isinstance(layers, Mapping):
        raise FormatError("quantization_config needs a list of schemes and a table of layers")
    activations = found.get("activations")
    if activations is not None:
        try:
            activations_from(activations, "quantization_config")
        except (PlanError, TypeError) as error:
            raise FormatError(f"damaged activations: {cut(error, 200)}") from error
    elif not layers:
        raise FormatError("quantization_config lists no layers and no activations")
    arithmetic = found.get("arithmetic", UNSTATED)
    if not is_arithmetic(arithmetic):
        raise FormatError(
            f"arithmetic must be one of {', '.join(ARITHMETICS)}, not {shown(arithmetic)}: the "
            "directory may need a newer quantine"
        )
    specs = [_checked_spec(number, scheme) for number, scheme in enumerate(schemes)]
    for name, layer in layers.items():
        index = layer.get("scheme") if isinstance(layer, Mapping) else None
        shape = layer.get("shape") if isinstance(layer, Mapping) else None
        if type(index) is not int or not 0 <= index < len(specs):
            said = shown(index)
            raise FormatError(f"{cut(name)} has scheme {said}, but there are {len(specs)}")
        sizes = shape if isinstance(shape, list) else []
        if len(sizes) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in sizes):
            raise FormatError(f"{cut(name)} has no shape [out, in], but {shown(shape)}")
        try:
            check_groups(specs[index], sizes[0], sizes[1])
        except FormatError as error:
            raise FormatError(f"{cut(name)} and its scheme disagree: {error}") from error


def _checked_spec(number: int, scheme: Any) -> QuantSpec:
    """The spec of scheme ``number``.

    Raises:
        FormatError: the scheme is damaged.
    """
    try:
        spec = spec_of(scheme)
    except KeyError as error:
        raise FormatError(f"scheme {number} is damaged: it has no field {error}") from error
    except (TypeError, AttributeError, PlanError) as error:
        raise FormatError(f"scheme {number} is damaged: {cut(error)}") from error
    if not all(type(size) is int and size > 0 for size in spec.cluster_sizes):
        raise FormatError(f"scheme {number} is damaged: cluster_sizes are no positive numbers")
    if spec.clustered != bool(spec.cluster_sizes):
        raise FormatError(f"scheme {number} is damaged: cluster_sizes belong to group_size 0 only")
    return spec


def spec_of(scheme: Mapping[str, Any]) -> QuantSpec:
    """The spec of a scheme as plain values, of any format version."""
    fields = {key: scheme[key] for key in ("bits", "group_size", "sym")}
    fields["group_axis"] = scheme.get("group_axis", "in")  # format version 1 had no other
    fields["cluster_sizes"] = tuple(scheme.get("cluster_sizes", ()))
    fields.update({key: scheme[key] for key in BLOCKED if key in scheme})
    if format_named(scheme["format"]).holds_statistics_as_codes:
        fields.update({k: scheme[k] for k in ("scale_bits", "zero_bits", "stat_group_size")})
    return QuantSpec(**fields)
