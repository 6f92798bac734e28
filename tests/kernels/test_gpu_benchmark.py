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


def test_matrices_of_any_height_are_made_of_a_few_rows() -> None:
    code = (
        "import dataclasses, torch, gpu_products\n"
        "for kind in gpu_products.KINDS:\n"
        "    part = gpu_products.qtensor_of(dataclasses.replace(kind, columns=128))\n"
        "    whole = gpu_products.repeated(part, 3)\n"
        "    assert torch.equal(whole.dequantize(), part.dequantize().repeat(3, 1))\n"
    )
    run(code)


def test_the_page_has_the_predictions_that_the_bytes_of_today_give() -> None:
    run(
        "import gpu_page\n"
        "page = gpu_page.PAGE.read_text()\n"
        "assert gpu_page.predictions() in page\n"
        "assert gpu_page.attentions() in page\n"
    )


def test_the_page_has_the_memory_that_plans_predict() -> None:
    run(
        "import gpu_page, gpu_plans\n"
        "text = gpu_page.table(gpu_plans.head(), gpu_plans.rows())\n"
        "assert text in gpu_page.PAGE.read_text()\n"
    )


def test_what_was_measured_becomes_a_table() -> None:
    run(
        "import gpu_page\n"
        "row = dict(kind='4 bits', outputs=4096, microseconds=4.6, float16_microseconds=13.2,\n"
        "           times_float16=2.87, gigabytes_per_second=1900.0)\n"
        "attended = row | dict(context=32768)\n"
        "outcome = dict(device='a card', torch='2.13', products=[row], attention=[attended],\n"
        "               tokens=[], gigabytes_per_second_copied=4400.0,\n"
        "               left_out=dict(tokens=['3 bits', '4 bits']))\n"
        "text = gpu_page.measured(outcome)\n"
        "assert '| 4 bits | 4096 | 4.6 | 13.2 | 2.87 | 1900.0 |' in text\n"
        "assert '| 13.2 | 2.87 | 1900.0 | 32768 |' in text\n"
        "assert 'a card, PyTorch 2.13; its memory copies 4400.0 GB/s.' in text\n"
        "assert 'Left out of tokens for want of time: 3 bits; 4 bits.' in text\n"
    )


def test_quantizing_is_timed_and_compared_with_the_cpu(tmp_path: Path) -> None:
    # Little sizes, and the CPU in the place of a GPU, so both must find the same.
    code = (
        "from pathlib import Path\n"
        "import gpu_quantizing as quantizing\n"
        "from quantine import Calibration\n"
        "from allowance import Allowance\n"
        "shape, calibration = quantizing.Shape(64, 128, 4, 2), Calibration(samples=2, seqlen=32)\n"
        "time = Allowance(float('inf'))\n"
        "rows = quantizing.solved_matrices(shape, 'cpu', 200, 16, time)\n"
        "assert len(rows) == 12\n"
        "assert all(0 < row['error'] == row['error_of_cpu'] < 0.02 for row in rows)\n"
        "scratch = [Path(name) for name in ('one', 'other')]\n"
        "for path in scratch: path.mkdir()\n"
        "rows = quantizing.solved_block(shape, 'cpu', calibration, scratch[0], time)\n"
        "assert all(len(row['seconds_of_layers']) == 7 for row in rows)\n"
        "rows = quantizing.solved_model('one/block', 'cpu', calibration, 32, scratch[1], time)\n"
        "assert [row['method'] for row in rows] == ['rtn', 'gptq', 'spqr']\n"
        "assert all(row['perplexity'] == row['perplexity_of_cpu'] for row in rows)\n"
    )
    run(code, tmp_path)


def test_the_documentation_has_the_predicted_tables() -> None:
    found = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_predictions.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    page = (BENCHMARKS.parent / "docs" / "gpu.md").read_text()
    rows = [line for line in found.stdout.splitlines() if line.startswith("|")]
    assert sum("fits of groups" in row for row in rows) == 4
    assert all(row in page for row in rows)


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


def test_what_was_found_is_kept_whatever_fails_after_it(tmp_path: Path) -> None:
    # A second passes whenever the clock is read; each part says whether it was allowed two things.
    run(
        "import itertools, json, pathlib, gpu\n"
        "def fail(_): raise RuntimeError('no such program')\n"
        "def two(allowance): return [allowance.allows(name) for name in ('first', 'second')]\n"
        "asked = {'one': gpu.Part('say one', 3.5, two), 'two': gpu.Part('fail', 0, fail),\n"
        "         'three': gpu.Part('say three', 5, two), 'four': gpu.Part('late', 0.5, two)}\n"
        "path, clock = pathlib.Path('found.json'), itertools.count().__next__\n"
        "assert not gpu.carried_out(asked, {'device': 'a card'}, path, clock)\n"
        "found = json.loads(path.read_text())\n"
        "assert found.pop('seconds') == dict(one=3, two=1, three=3, four=3)\n"
        "assert found == {'device': 'a card', 'one': [True, True],\n"
        "    'two': 'failed: no such program', 'three': [True, False], 'four': [False, False],\n"
        "    'left_out': {'three': ['second'], 'four': ['first', 'second']}, 'failed': {}}\n"
        "assert gpu.carried_out({'one': asked['one']}, {}, path)\n"
        "parts = gpu.parts(None)\n"  # those of make gpu: each that is said can be done
        "assert list(parts) == list(gpu.PARTS)\n"
        "assert all(callable(part.do) for part in parts.values())\n",
        tmp_path,
    )


def test_the_tests_of_all_programs_run_on_the_gpu() -> None:
    run(
        "import gpu\n"
        "files = (gpu.ROOT / 'tests' / 'kernels').glob('test_triton_*.py')\n"
        "assert {f'tests/kernels/{file.name}' for file in files} <= set(gpu.TESTS)\n"
        "assert all((gpu.ROOT / name).exists() for name in gpu.TESTS)\n"
    )


def test_tests_that_begin_when_no_time_is_left_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_first(): time.sleep(0.6)\ndef test_second(): assert False\n"
    )
    run(
        "import sys, gpu, allowance, time\n"
        "gpu.TESTS, gpu.ROOT = ('test_slow.py',), '.'\n"
        "left = allowance.Allowance(time.monotonic() + 0.5)\n"
        "found = gpu.tested(left)\n"
        "assert found['pytest'].startswith('1 passed, 1 skipped'), found\n"
        "assert left.left_out == ['test_slow.py::test_second']\n",
        tmp_path,
    )


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


def run(code: str, directory: Path | None = None) -> None:
    """Run ``code`` beside the benchmarks, in a process where Triton compiles."""
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])}
    subprocess.run([sys.executable, "-c", code], env=surroundings, check=True, cwd=directory)
