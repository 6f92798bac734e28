"""Which instructions of a GPU a program is compiled with."""

from __future__ import annotations

from typing import Any

import triton


def settings(program: Any, **texts: tuple[str, str]) -> dict[str, str]:
    """Texts of instructions and their constraints, as a program of Triton takes them.

    Triton's interpreter knows no instructions of a GPU. There texts are empty, and the program
    computes the same by ordinary operations.

    Args:
        program: the program, which is interpreted or compiled.
        texts: by the first part of the names of its settings, text and constraints.
    """
    compiled = isinstance(program, triton.JITFunction)
    found = {}
    for name, (text, constraints) in texts.items():
        found[f"{name}_TEXT"] = text if compiled else ""
        found[f"{name}_CONSTRAINTS"] = constraints
    return found
