"""The ``quantization_config`` of a compressed-tensors checkpoint, written and read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from quantine.core.spec import WHOLE_ROW, QuantSpec
from quantine.errors import FormatError, PlanError, cut, shown
from quantine.formats.foreign.compressed_tensors.int8 import FORMAT as INT8_FORMAT
from quantine.formats.foreign.plain import names_in, plain_spec

METHOD: Final = "compressed-tensors"
"""``quant_method`` of such directories."""
FORMAT: Final = "pack-quantized"
"""The one of its formats for codes in words."""
VERSION: Final = "0.20.0"
"""Version of the library whose layout is written."""
CLASS: Final = "Linear"
"""The target that means every layer."""
PATTERN: Final = "re:"
"""Beginning of the targets that are patterns."""
ORDERS: Final = (None, "static", "weight", False)
"""Values of ``actorder`` with which files look as if there were none."""


def settings_of(
    specs: Mapping[str, QuantSpec],
    kept: Sequence[str],
    every_linear: bool,
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The fields of ``quantization_config`` for layers with these grids.

    Args:
        specs: of the quantized layers, by name.
        kept: names of the Linear modules that are not quantized.
        every_linear: whether layers with one common grid may be called ``Linear`` together.
        inputs: how inputs of layers are rounded; ``None`` where they are not.
    """
    layout = FORMAT if inputs is None else INT8_FORMAT
    distinct = list(dict.fromkeys(specs.values()))
    groups = {}
    for number, spec in enumerate(distinct):
        names = [name for name, other in specs.items() if other == spec]
        targets = [CLASS] if len(distinct) == 1 and every_linear else names
        groups[f"group_{number}"] = _group(spec, targets, layout, inputs)
    return {
        "quant_method": METHOD,
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(kept),
        "kv_cache_scheme": None,
        "version": VERSION,
    }


def _group(
    spec: QuantSpec, targets: list[str], layout: str, inputs: Mapping[str, Any] | None
) -> dict[str, Any]:
    rows = spec.group_size == WHOLE_ROW
    return {
        "targets": targets,
        "weights": {
            "num_bits": spec.bits,
            "type": "int",
            "symmetric": spec.sym,
            "strategy": "channel" if rows else "group",
            "group_size": None if rows else spec.group_size,
            "dynamic": False,
            "actorder": None,
        },
        "input_activations": inputs,
        "output_activations": None,
        "format": layout,
    }


@dataclass(frozen=True)
class Settings:
    """A ``quantization_config`` that has been read.

    Attributes:
        groups: targets and grid of each group of layers.
        ignored: names of layers, or patterns, that are not quantized.
    """

    groups: Sequence[tuple[Sequence[str], QuantSpec]]
    ignored: Sequence[str]

    def spec(self, name: str) -> QuantSpec | None:
        """The grid of Linear layer ``name``; ``None`` if it is float."""
        if any(target == CLASS or _matches(target, name) for target in self.ignored):
            return None
        specs = {target: spec for targets, spec in self.groups for target in targets}
        # As the library ranks them: names, then patterns by the alphabet, then names of classes.
        ranked = sorted(specs, key=lambda target: (target.startswith(PATTERN), target))
        return specs.get(next((one for one in ranked if _matches(one, name)), CLASS))


def read_settings(found: Mapping[str, Any]) -> Settings:
    """The fields of ``quantization_config`` that reading needs.

    Raises:
        FormatError: one is missing, or says what is not understood.
    """
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise FormatError(f"quantization_config has no config_groups, but {shown(groups)}")
    sparsity = found.get("sparsity_config")
    is_dense = isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"
    if (sparsity and not is_dense) or found.get("transform_config"):
        raise FormatError(
            "quantization_config has a sparsity_config or transform_config, which is not read: "
            "decompress the model with compressed-tensors first"
        )
    if found.get("kv_cache_scheme"):
        raise FormatError(
            "quantization_config has a kv_cache_scheme, so keys and values are rounded, which is "
            "not read: make it null to go on without"
        )
    ignored = names_in(found, "ignore")
    whole = found.get("format")
    read = [_read_group(name, group, whole) for name, group in groups.items()]
    return Settings(read, ignored)


def _read_group(name: str, group: Any, whole: Any) -> tuple[list[str], QuantSpec]:
    try:
        weights, targets = group["weights"], names_in(group, "targets")
        layout = group.get("format") or whole
        if layout != FORMAT:
            raise FormatError(f"{name} has format {shown(layout)}: only {FORMAT} is read")
        if group.get("input_activations") or group.get("output_activations"):
            raise FormatError(f"{name} rounds activations, which is not read")
        if weights["type"] != "int" or weights.get("dynamic"):
            raise FormatError(f"{name} holds weights of type {shown(weights['type'])}: not read")
        if weights.get("actorder") not in ORDERS:
            raise FormatError(f"{name} has actorder {shown(weights['actorder'])}: not read")
        strategy, size = weights["strategy"], weights.get("group_size")
        if strategy not in {"channel", "group"}:
            raise FormatError(f"{name} has strategy {shown(strategy)}: not read")
        size = WHOLE_ROW if strategy == "channel" else size
        return targets, plain_spec(weights["num_bits"], size, weights["symmetric"])
    except (LookupError, TypeError, AttributeError, PlanError) as error:
        raise FormatError(f"{cut(name)} of quantization_config is damaged: {cut(error)}") from error


def _matches(target: str, name: str) -> bool:
    """Whether ``target``, a name or a pattern, means layer ``name``."""
    if target.startswith(PATTERN):
        try:
            return re.match(target.removeprefix(PATTERN), name) is not None
        except re.error as error:
            raise FormatError(f"{shown(target)} in quantization_config is no pattern") from error
    return target == name
