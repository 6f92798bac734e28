"""No tensor of the package is made on a device or of a dtype that nobody named.

And none strays to C++.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantine

SOURCES = Path(quantine.__file__).parent

FACTORIES = frozenset(
    {
        *("arange", "as_tensor", "asarray", "blackman_window", "empty", "empty_permuted"),
        *("empty_strided", "eye", "full", "hann_window", "linspace", "logspace", "normal", "ones"),
        *("rand", "randint", "randn", "randperm", "scalar_tensor", "sparse_coo_tensor"),
        *("sparse_csr_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
    }
)
"""Functions of `torch` that make a tensor out of no other one."""
SKELETONS = {
    "calibrate/skeleton.py": "a model of transformers is built without memory for its weights",
    "families/derivation/derive.py": "a small model runs on the CPU, wherever a caller computes",
    "families/derivation/small.py": "a small model is built on the CPU, wherever a caller computes",
    "source/model_source.py": "a model is built only to know the names and shapes of its tensors",
}
"""Where a block ``with torch.device(...)`` may stand: what is built there is not quantine's."""
NATIVE = {
    "eval/breakdown.py": "times the native decoder, which there is only on the CPU",
    "eval/speed.py": "times the native kernels, on models that are on the CPU",
    "formats/inventory.py": "says which kernels there are",
    "kernels/backend.py": "finds the extension, and asks for the device",
    "kernels/threads.py": "threads know no tensor",
    "kernels/integer/__init__.py": "asks whether there is an extension whose levels to list",
    "runtime/decoder.py": "a decoder is made only of a model on the CPU",
}
"""Files that reach for the extension besides those called ``cpu.py``, and why they may."""


def parsed() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCES.rglob("*.py")):
        yield str(path.relative_to(SOURCES)), ast.parse(path.read_text(encoding="utf-8"))


def untyped(tree: ast.Module) -> list[int]:
    """Lines of ``tree`` that make a tensor of PyTorch's default dtype, or of whatever comes."""
    found = []
    for name, call in called(tree):
        module, _, leaf = name.rpartition(".")
        named = any(keyword.arg == "dtype" for keyword in call.keywords)
        whole = leaf in {"arange", "randint", "randperm", "tril_indices", "triu_indices"}
        if module == "torch" and leaf in FACTORIES and not whole and not named:
            found.append(call.lineno)
    return sorted(found)


def unencoded(tree: ast.Module) -> list[int]:
    """Lines of ``tree`` that read or write text in the encoding of the user's locale."""
    found = []
    for name, call in called(tree):
        leaf = name.rpartition(".")[2]
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        strings = [value.value for value in values if isinstance(value, ast.Constant)]
        binary = leaf == "open" and any(isinstance(s, str) and "b" in s for s in strings)
        text = (leaf in {"read_text", "write_text"} and "." in name) or leaf == "open"
        named = any(keyword.arg == "encoding" for keyword in call.keywords)
        if text and not named and not binary and not name.startswith(("os.", "store.")):
            found.append(call.lineno)
    return sorted(found)


def called(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a dotted name in ``tree``, with the name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def unnamed(tree: ast.Module) -> list[int]:
    """Lines of ``tree`` that make a tensor or a generator on a device that they do not name."""
    found = []
    for name, call in called(tree):
        module, _, leaf = name.rpartition(".")
        named = any(keyword.arg == "device" for keyword in call.keywords)
        factory = module == "torch" and leaf in FACTORIES
        generator = module == "torch" and leaf == "Generator" and not call.args
        if (factory or generator) and not named:
            found.append(call.lineno)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [node.lineno for alias in node.names if alias.name in FACTORIES]
    return sorted(found)


def test_every_tensor_is_made_on_a_device_that_is_named() -> None:
    found = {name: lines for name, tree in parsed() if (lines := unnamed(tree))}
    assert found == {}


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("x = torch.zeros(2)", [1]),
        ("x = torch.zeros(2, device=y.device)", []),
        ("g = torch.Generator()", [1]),
        ("g = torch.Generator(device)", []),
        ("from torch import Tensor, empty", [1]),
        ("x = numpy.zeros(2)\ny = torch.tensor([1])", [2]),
    ],
)
def test_the_look_at_sources_finds_unnamed_devices(code: str, lines: list[int]) -> None:
    assert unnamed(ast.parse(code)) == lines


def test_every_tensor_is_made_of_a_dtype_that_is_named() -> None:
    found = {name: lines for name, tree in parsed() if (lines := untyped(tree))}
    assert found == {}


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("x = torch.zeros(2, device=d)", [1]),
        ("x = torch.zeros(2, device=d, dtype=t)", []),
        ("x = torch.arange(2, device=d)", []),
        ("x = numpy.zeros(2)\ny = torch.tensor([1.0], device=d)", [2]),
    ],
)
def test_the_look_at_sources_finds_unnamed_dtypes(code: str, lines: list[int]) -> None:
    assert untyped(ast.parse(code)) == lines


def test_text_is_read_and_written_in_an_encoding_that_is_named() -> None:
    found = {name: lines for name, tree in parsed() if (lines := unencoded(tree))}
    assert found == {}


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("path.read_text()", [1]),
        ('path.read_text(encoding="utf-8")', []),
        ('path.write_text("b")\nopen(path)', [1, 2]),
        ('path.open("rb")', []),
    ],
)
def test_the_look_at_sources_finds_unnamed_encodings(code: str, lines: list[int]) -> None:
    assert unencoded(ast.parse(code)) == lines


def test_no_device_is_made_the_default_but_for_skeletons() -> None:
    found = set()
    for file, tree in parsed():
        for name, _ in called(tree):
            if name in {"torch.set_default_device", "torch.set_default_tensor_type"}:
                found.add(file)
        for node in ast.walk(tree):
            if isinstance(node, ast.With) and any(
                ast.unparse(item.context_expr).startswith("torch.device(") for item in node.items
            ):
                found.add(file)
    assert found == set(SKELETONS)


def test_autocast_is_told_the_device_of_its_tensors() -> None:
    for file, tree in parsed():
        for name, call in called(tree):
            if name.endswith("autocast"):
                assert not any(isinstance(arg, ast.Constant) for arg in call.args[:1]), file


def test_the_extension_is_reached_only_behind_the_question_for_the_device() -> None:
    found = set()
    for file, tree in parsed():
        for name, call in called(tree):
            strings = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
            if name in {"backend.extension", "backend.native"} or "quantine._native" in strings:
                found.add(file)
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                if name.startswith("quantine._native") or name in {
                    "quantine._native",
                    "quantine.kernels.backend.extension",
                    "quantine.kernels.backend.native",
                }:
                    found.add(file)
    elsewhere = {file for file in found if Path(file).name != "cpu.py" or "kernels" not in file}
    assert elsewhere == set(NATIVE)


def test_only_choosers_call_native_kernels() -> None:
    """A file ``cpu.py`` is used by the module beside it, which asks, and by others like it."""
    found = set()
    for file, tree in parsed():
        if Path(file).name == "cpu.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and any(
                alias.name == "cpu" for alias in node.names
            ):
                assert str(node.module) == f"quantine.{Path(file).parent}".replace("/", "."), file
                found.add(file)
    assert found, "no module chooses between kernels"
