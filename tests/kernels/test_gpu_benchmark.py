"""`make gpu` where there is no GPU, and the parts of it that need none."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantine.kernels.matrix.units.unit_matrix import unit_matrix
from quantine.runtime.generate import ModuleDecoder
from quantine.runtime.graph_decoder import StaticDecoder
from quantine.runtime.packed import packed_modules

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
gpu_parts: Any = importlib.import_module("gpu_parts")
gpu_tokens: Any = importlib.import_module("gpu_tokens")


def make_gpu(python: str) -> subprocess.CompletedProcess[str]:
    """What `make gpu PYTHON=...` does."""
    return subprocess.run(
        ["sh", str(BENCHMARKS / "gpu.sh")],
        env=os.environ | {"PYTHON": python},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_all_parts_are_said_and_nothing_is_installed(tmp_path: Path) -> None:
    # A Python without PyTorch, and one whose PyTorch knows no GPU.
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    itself = [sys.executable, str(BENCHMARKS / "gpu.py")]
    whole = subprocess.run(itself, capture_output=True, text=True, check=True).stdout
    for python in (str(bare / "bin" / "python"), sys.executable):
        found = make_gpu(python)
        assert found.returncode == 0
        first, *rest = found.stdout.splitlines()
        assert first.startswith(f"{python} has no PyTorch that knows a GPU")
        assert rest == whole.splitlines()[1:]
        assert [line.strip(" ,") for line in rest[:-1]] == [
            p.said for p in gpu_parts.PARTS.values()
        ]
        assert "gpu-NAME.json" in rest[-1]
    assert not (BENCHMARKS.parent / ".venv-gpu").exists()


@pytest.mark.parametrize("python", ["/no/such/python", "true"])
def test_what_is_no_python_is_refused(python: str) -> None:
    found = make_gpu(python)
    assert found.returncode == 1
    assert found.stderr.startswith(f"'{python}' does not run as a Python")
    assert found.stdout == ""


@pytest.mark.parametrize("kind", ["bfloat16", *gpu_tokens.KINDS])
def test_models_of_any_shape_decode_by_the_step_that_is_recorded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, few in {"PROMPT": 5, "TOKENS": 2, "RUNS": 2}.items():
        monkeypatch.setattr(gpu_tokens, name, few)
    torch.manual_seed(0)
    shape = gpu_tokens.Shape(128, 256, 1, 4, 2, 50)
    model = gpu_tokens.model_of(shape, gpu_tokens.KINDS.get(kind), "cpu")
    packed = [module for _, module in packed_modules(model)]
    assert len(packed) == (0 if kind == "bfloat16" else 7)
    made = []

    def make(model: Any, room: int) -> StaticDecoder:
        made.append(StaticDecoder(model, room, lambda step: step))
        return made[0]

    assert gpu_tokens.speed_of(model, make) > 0
    assert made[0].position == made[0].capacity == 7
    assert all(unit_matrix(module.qtensor()) is not None for module in packed)
    tokens = torch.arange(5) % 97 + 3
    made[0].reset()
    expected = ModuleDecoder(model).append(tokens)
    assert bool(expected.isfinite().all())
    torch.testing.assert_close(made[0].append(tokens), expected, rtol=2e-2, atol=2e-2)


def test_the_packages_of_a_virtual_environment_are_used(tmp_path: Path) -> None:
    # A tree with a script that says what it sees, a Python without pip, and a torch with a GPU.
    outer, tree = tmp_path / "outer", tmp_path / "tree"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(outer)], check=True)
    (site,) = outer.glob("lib/python*/site-packages")
    (site / "torch.py").write_text(
        "class cuda:\n    @staticmethod\n    def is_available(): return True\n"
    )
    (site / "editable.pth").write_text(str(tmp_path / "beside") + "\n")
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "installed_so.py").touch()
    (tree / "benchmarks").mkdir(parents=True)
    (tree / "benchmarks" / "gpu.py").write_text(
        "import os, sys, torch, installed_so\n"
        "print(sys.prefix, torch.__file__, os.environ['PYTHONPATH'])\n"
    )
    script = tree / "benchmarks" / "gpu.sh"
    script.write_text((BENCHMARKS / "gpu.sh").read_text())
    surroundings = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    found = subprocess.run(
        ["sh", str(script)],
        env=surroundings | {"PYTHON": str(outer / "bin" / "python")},
        capture_output=True,
        text=True,
        check=True,
    )
    said = found.stdout.splitlines()
    assert "nothing could be installed" in said[0]
    assert said[1].split() == [str(tree / ".venv-gpu"), str(site / "torch.py"), "src"]


def test_parts_and_page_where_triton_compiles() -> None:
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    itself = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    found = subprocess.run(
        [*itself, str(Path(__file__).with_name("compiled_gpu_benchmark.py"))],
        env=surroundings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout
