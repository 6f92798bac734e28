"""Programs run on the device of their tensors, whichever is the current one."""

from __future__ import annotations

import ast
from pathlib import Path

import torch

import quantine
from quantine.kernels import backend

KERNELS = Path(quantine.__file__).parent / "kernels"


def launches(tree: ast.AST, inside: bool = False) -> list[tuple[int, bool]]:
    """Line of each launch ``program[grid](...)``, and whether it is inside of `launching`."""
    if isinstance(tree, ast.With):
        inside = inside or any("launching" in ast.unparse(item) for item in tree.items)
    found = []
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Subscript):
        found.append((tree.lineno, inside))
    for child in ast.iter_child_nodes(tree):
        found += launches(child, inside)
    return found


def test_every_launch_names_the_device_of_its_tensors() -> None:
    files = sorted(KERNELS.glob("*/triton/*.py"))
    found = {file: launches(ast.parse(file.read_text())) for file in files}
    assert sum(map(len, found.values())) >= 13
    wrong = [
        f"{file}:{line}" for file, them in found.items() for line, inside in them if not inside
    ]
    assert wrong == []


def test_on_the_cpu_nothing_is_entered() -> None:
    with backend.launching(torch.ones(1)):
        assert not torch.cuda.is_initialized()
