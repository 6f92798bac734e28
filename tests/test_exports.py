"""The public interface: three lists that agree, and a docstring on everything."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantine

SOURCE = Path(quantine.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))


def typing_imports() -> dict[str, str]:
    """Name to module, of the imports that type checkers see in ``quantine/__init__.py``."""
    tree = ast.parse(Path(quantine.__file__).read_text(encoding="utf-8"))
    blocks = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    assert len(blocks) == 1
    statements = [node for node in blocks[0].body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in statements for alias in node.names}


def test_the_three_lists_agree() -> None:
    assert len(quantine.__all__) == len(set(quantine.__all__))
    assert set(quantine.__all__) == set(quantine._HOME)
    assert {name: f"quantine.{home}" for name, home in quantine._HOME.items()} == typing_imports()
    assert dir(quantine) == sorted([*quantine.__all__, "__version__"])


@pytest.mark.parametrize("name", quantine.__all__)
def test_every_export_is_defined_where_it_says_and_documented(name: str) -> None:
    value = getattr(quantine, name)
    assert value.__name__ == name
    assert value.__module__ == f"quantine.{quantine._HOME[name]}"
    assert value is getattr(importlib.import_module(value.__module__), name)
    # Dataclasses without a docstring get their signature for one.
    assert inspect.getdoc(value)
    assert not str(value.__doc__).startswith(f"{name}(")


def test_star_import_gives_the_exports() -> None:
    namespace: dict[str, object] = {}
    exec("from quantine import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(quantine.__all__)


def test_other_names_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'quantine' has no attribute 'quantise'"):
        quantine.quantise  # noqa: B018
    assert not hasattr(quantine, "torch")


def test_every_error_is_exported_and_in_the_drawing() -> None:
    import quantine.errors as errors

    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert kinds.keys() <= set(quantine.__all__)
    assert all(issubclass(kind, quantine.QuantineError) for kind in kinds.values())
    assert all(f" {name} " in f"{errors.__doc__} ".replace("\n", " ") for name in kinds)


def public(node: ast.Module | ast.ClassDef, path: str) -> Iterator[tuple[str, ast.AST]]:
    """Public functions, classes and methods below ``node``."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if child.name.startswith("_"):
                continue
            yield f"{path}.{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{path}.{child.name}")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(SOURCE).as_posix())
def test_everything_public_has_a_docstring(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has none"
    bare = [name for name, node in public(tree, file.stem) if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert bare == []
