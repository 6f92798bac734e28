"""The ``quantization_config`` of a GPTQ checkpoint, written and read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from quantine.core.spec import WHOLE_ROW, QuantSpec
from quantine.errors import FormatError, PlanError, cut, shown
from quantine.formats.foreign.plain import plain_spec

Rule = TypeVar("Rule")
METHOD: Final = "gptq"
"""``quant_method`` of such directories."""
VERSIONS: Final = {"gptq": 1, "gptq_v2": 2}
"""Versions of the checkpoint format by what ``checkpoint_format`` calls them."""

FUSED: Final = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Names that vLLM gives to matrices it multiplies as one, by which it looks for rules."""


def settings_of(
    specs: Mapping[str, QuantSpec], ordered: bool, version: int, kept: Sequence[str], head: str
) -> dict[str, Any]:
    """The fields of ``quantization_config`` for layers with these grids.

    Args:
        specs: of the quantized layers, at least one, by name.
        ordered: whether a layer has ``g_idx``.
        version: of the checkpoint format.
        kept: names of the matrices in decoder blocks that are not quantized.
        head: name of the output head.
    """
    base = Counter(specs.values()).most_common(1)[0][0]
    name = next(name for name, number in VERSIONS.items() if number == version)
    others = _with_fused({layer: spec for layer, spec in specs.items() if spec != base})
    dynamic: dict[str, Any] = {
        f"+:^{re.escape(layer)}$": {
            "bits": spec.bits,
            "group_size": spec.group_size,
            "sym": spec.sym,
        }
        for layer, spec in others.items()
    }
    dynamic.update({f"-:^{re.escape(layer)}$": {} for layer in _with_fused(dict.fromkeys(kept))})
    return {
        "quant_method": METHOD,
        "bits": base.bits,
        "group_size": base.group_size,
        "sym": base.sym,
        "desc_act": ordered,
        "lm_head": head in specs,
        "checkpoint_format": name,
        "format": name,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": ["quantine"]},
    }


def _with_fused(rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """``rules`` of layers, and those of vLLM's fused ones whose members all have the same rule."""
    found = dict(rules)
    for parent in dict.fromkeys(layer.rpartition(".")[0] for layer in rules):
        for fused, members in FUSED.items():
            said = [rules[name] for one in members if (name := f"{parent}.{one}") in rules]
            if len(said) == len(members) and all(one == said[0] for one in said):
                found[f"{parent}.{fused}"] = said[0]
    return found


@dataclass(frozen=True)
class Settings:
    """A ``quantization_config`` that has been read.

    Attributes:
        version: of the checkpoint format.
        ordered: whether inputs were solved in another order than theirs (``desc_act``), so that
            ``g_idx`` has to say which group each is in.
        base: grid of layers for which nothing else is said.
        dynamic: changes by regular expressions on the names of layers; ``None`` keeps a layer in
            floats.
    """

    version: int
    ordered: bool
    base: QuantSpec
    dynamic: Mapping[str, Mapping[str, Any] | None]

    def spec(self, name: str) -> QuantSpec | None:
        """The grid of layer ``name``; ``None`` if it is said to be float.

        Raises:
            FormatError: what is said of the layer is not valid.
        """
        for pattern, change in self.dynamic.items():
            if re.match(pattern, name):
                return None if change is None else _spec({**_fields(self.base), **change})
        return self.base


def read_settings(found: Mapping[str, Any]) -> Settings:
    """The fields of ``quantization_config`` that reading needs.

    Raises:
        FormatError: one is missing, or says what is not understood.
    """
    said = found.get("checkpoint_format") or found.get("format") or "gptq"
    if not isinstance(said, str) or said not in VERSIONS:
        raise FormatError(
            f"checkpoint_format {shown(said)} is not read, only {', '.join(VERSIONS)}: the "
            "directory is of another version"
        )
    other = found.get("format")
    if other is not None and other != said:
        raise FormatError(
            f"checkpoint_format says {shown(said)} and format {shown(other)}: remove the wrong one"
        )
    if found.get("pack_dtype") not in (None, "int32"):
        raise FormatError(f"pack_dtype {shown(found['pack_dtype'])} is not read, only int32")
    ordered = found.get("desc_act") or False
    if not isinstance(ordered, bool):
        raise FormatError(f"desc_act in quantization_config is {shown(ordered)}: true or false")
    dynamic: dict[str, Mapping[str, Any] | None] = {}
    rules = found.get("dynamic") or {}
    if not isinstance(rules, Mapping):
        raise FormatError(f"quantization_config.dynamic is no table, but {shown(rules)}")
    for key, change in rules.items():
        pattern = key.removeprefix("+:").removeprefix("-:")
        try:
            re.compile(pattern)
        except re.error as error:
            raise FormatError(f"{shown(key)} in quantization_config is no pattern") from error
        kept = key.startswith("-:")
        if not kept and not isinstance(change, Mapping):
            raise FormatError(
                f"{shown(key)} in quantization_config.dynamic is no table, but {shown(change)}"
            )
        dynamic[pattern] = None if kept else change
    return Settings(VERSIONS[said], ordered, _spec(found), dynamic)


def _fields(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.sym}


def _spec(found: Mapping[str, Any]) -> QuantSpec:
    try:
        size = found.get("group_size", WHOLE_ROW)
        return plain_spec(found["bits"], size, bool(found.get("sym", False)))
    except (KeyError, TypeError, AttributeError, PlanError) as error:
        raise FormatError(f"quantization_config is damaged: {cut(error)}") from error
