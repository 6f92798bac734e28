"""How a layer's scheme is written in a cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def scheme_text(scheme: Mapping[str, Any]) -> str:
    """Method, bits, groups, symmetry and format of a scheme, as in ``rtn 4 bit g64 sym, dense``."""
    kind = "sym" if scheme["sym"] else "asym"
    codes = f"{scheme['bits']} bit {group_text(scheme)} {kind}"
    return f"{scheme['method']} {codes}, {scheme['format']}"


def group_text(scheme: Mapping[str, Any]) -> str:
    """What shares a scale: a row, a column, a cluster, or a group of inputs or outputs."""
    along_inputs = scheme.get("group_axis", "in") == "in"
    if scheme["group_size"] == -1:
        return "row" if along_inputs else "column"
    if scheme["group_size"] == 0:
        return "clusters"
    return f"g{scheme['group_size']}" + ("" if along_inputs else " out")
