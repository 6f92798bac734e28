"""Imports point one way, and heavy libraries are imported where they are needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Final

import pytest

import quantine

SOURCE: Final = Path(quantine.__file__).parent

FLOORS: Final[tuple[tuple[str, ...], ...]] = (
    # From the ground up: a room imports from rooms on lower floors only. docs/architecture.md
    ("errors",),
    ("core", "families", "ranks", "source"),
    ("kernels", "statistics"),
    ("activations", "calibrate", "formats", "methods"),
    ("budget", "plan", "rotation", "rptq", "runtime", "tuning"),
    ("engines", "eval", "run", "server"),
    ("comparison", "report", "survey"),
    ("commands",),
    ("cli", "__main__"),
)
MOST_FLOORS: Final = 9
ROOT: Final = {"__init__.py", "__main__.py", "cli.py", "errors.py"}
MOST_AT_THE_ROOT: Final = 4
"""Modules beside those of `ROOT`."""

ONLY_INSIDE_FUNCTIONS: Final = (
    "datasets",
    "gguf",
    "huggingface_hub",
    "lm_eval",
    "matplotlib",
    "pyarrow",
    "pydoc_data",
    "sklearn",
    "zstandard",
)
LM_EVAL_ON_TOP: Final = "eval/task_model.py"
"""A class of lm-eval's has a subclass there."""
TRANSFORMERS_ON_TOP: Final = ("runtime/hf.py", "runtime/kv_cache.py")
TRANSFORMERS_INSIDE: Final = (
    "activations/attention.py",
    "activations/linked.py",
    "calibrate/backward.py",
    "calibrate/block_loader.py",
    "calibrate/setup.py",
    "calibrate/skeleton.py",
    "eval/",
    "families/__init__.py",
    "families/base.py",
    "families/derivation/",
    "rotation/",
    "run/job.py",
    "run/prepare.py",
    "run/request_checks.py",
    "runtime/",
    "source/",
    "survey/",
    "tuning/",
)


@dataclass(frozen=True)
class Import:
    """One import statement: ``where`` is ``"top"``, ``"function"`` or ``"typing"``."""

    file: str
    target: str
    where: str
    line: int


@cache
def files() -> tuple[Path, ...]:
    return tuple(sorted(SOURCE.rglob("*.py")))


@cache
def module_names() -> frozenset[str]:
    return frozenset(module_name(file) for file in files())


def module_name(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The package or top-level module directly below ``quantine``; the root is ``quantine``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for file in files() for found in imports_of(file))


def imports_of(file: Path) -> Iterator[Import]:
    path = file.relative_to(SOURCE).as_posix()

    def walk(node: ast.AST, where: str) -> Iterator[Import]:
        if isinstance(node, ast.expr):  # which has no statements in it
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, alias.name, where, node.lineno)
            return
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            assert node.module is not None
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                target = inside if inside in module_names() else node.module
                yield Import(path, target, where, node.lineno)
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            where = "function"
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.iter_child_nodes(node):
            is_body = isinstance(node, ast.If) and child in node.body
            yield from walk(child, "typing" if typing and is_body else where)

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), "top")


def internal() -> list[tuple[str, str, Import]]:
    """``(importing module, imported module, statement)`` inside the package."""
    return [
        (module_name(SOURCE / found.file), found.target, found)
        for found in imports()
        if found.target.split(".")[0] == "quantine"
    ]


def test_every_room_has_one_floor_and_there_are_few() -> None:
    rooms = [room for floor in FLOORS for room in floor]
    assert len(rooms) == len(set(rooms))
    assert {room_of(module_name(file)) for file in files()} - {"quantine"} == set(rooms)
    assert len(FLOORS) <= MOST_FLOORS


def test_few_modules_are_loose() -> None:
    loose = {file.name for file in SOURCE.glob("*.py")} - ROOT
    assert len(loose) <= MOST_AT_THE_ROOT, loose


@pytest.mark.parametrize("number", range(len(FLOORS)))
def test_imports_point_down(number: int) -> None:
    below = {room for floor in FLOORS[:number] for room in floor}
    wrong = [
        f"{found.file}:{found.line} imports {target}"
        for module, target, found in internal()
        if (room := room_of(module)) in FLOORS[number]
        and room_of(target) not in {room, *below}
        and (room, target) != ("cli", "quantine")  # its version
        and (room, target) != ("__main__", "quantine.cli")  # which it runs
    ]
    assert wrong == []


def test_modules_import_each_other_in_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, target, _ in internal():
        if "quantine" not in (module, target) and module != target:
            graph.setdefault(module, set()).add(target)
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_transformers_stays_in_its_place() -> None:
    wrong = [
        f"{found.file}:{found.line} imports {found.target} ({found.where})"
        for found in imports()
        if found.target.split(".")[0] == "transformers"
        and not found.file.startswith(TRANSFORMERS_ON_TOP)
        and (found.where == "top" or not found.file.startswith(TRANSFORMERS_INSIDE))
    ]
    assert wrong == []


def test_what_imports_heavy_libraries_on_top_is_itself_imported_late() -> None:
    on_top = {module_name(SOURCE / file) for file in (*TRANSFORMERS_ON_TOP, LM_EVAL_ON_TOP)}
    wrong = [
        f"{found.file}:{found.line}"
        for _, target, found in internal()
        if target in on_top and found.where != "function"
    ]
    assert wrong == []


def test_optional_libraries_are_imported_inside_functions() -> None:
    wrong = [
        f"{found.file}:{found.line} imports {found.target} ({found.where})"
        for found in imports()
        if found.target.split(".")[0] in ONLY_INSIDE_FUNCTIONS
        and found.where == "top"
        and (found.file, found.target.split(".")[0]) != (LM_EVAL_ON_TOP, "lm_eval")
    ]
    assert wrong == []


def in_triton(path: str) -> bool:
    """Whether a file belongs to a stem's package of programs for GPUs, or to what they share."""
    parts = Path(path).parts
    return parts[0] == "kernels" and (parts[2:3] == ("triton",) or parts[1] == "programs")


def test_triton_is_imported_at_first_use() -> None:
    """Programs import Triton on top; what launches them imports them inside of functions."""
    wrong = [
        f"{found.file}:{found.line} imports {found.target} ({found.where})"
        for found in imports()
        if (
            found.target.split(".")[0] == "triton"
            or ".triton" in found.target + "."
            or found.target.startswith("quantine.kernels.programs")
        )
        and found.where != "function"
        and not in_triton(found.file)
    ]
    assert wrong == []


def test_the_scan_sees_what_it_should() -> None:
    # A test of absence is worth something only if presence would be seen.
    kinds = {(f.file, f.target, f.where) for f in imports()}
    assert ("runtime/hf.py", "transformers.quantizers.base", "top") in kinds
    assert ("calibrate/setup.py", "transformers", "typing") in kinds
    assert ("calibrate/skeleton.py", "transformers", "function") in kinds
    assert ("calibrate/text.py", "datasets", "function") in kinds
    assert ("kernels/bits/__init__.py", "quantine.kernels.backend", "top") in kinds
    assert ("kernels/matrix/triton/few_rows.py", "triton", "top") in kinds


@pytest.mark.parametrize(
    "statement",
    [
        "import quantine",
        "import quantine; dir(quantine); quantine.PlanError",
        "from quantine.cli import build_parser; build_parser().format_help()",
    ],
)
def test_importing_is_light(statement: str) -> None:
    code = f"{statement}; import sys; print(*(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "quantine" in loaded
    heavy = {"torch", "transformers", "numpy", "safetensors", "starlette", "uvicorn"}
    assert not loaded & {*heavy, *ONLY_INSIDE_FUNCTIONS}
