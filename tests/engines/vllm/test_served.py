"""The real vLLM, on the CPU, answers what quantine does; `make engines` runs this."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engines
pytest.importorskip("vllm")

from directories import SERVED, TOKENS, Directories, own_answers, prompts  # noqa: E402

from quantine import Calibration, Plan, quantize  # noqa: E402
from quantine.formats.export import export  # noqa: E402

PROGRAM = Path(__file__).with_name("serve.py")
NOISE = 2e-5
"""How much logarithmic probabilities may differ: sums are in another order."""
DEEP = 5e-5
"""Likewise where there are many blocks."""
ROUNDED = 0.1
"""Likewise where activations are rounded: one between two codes may fall to the other side."""
COARSE = 0.2
"""The same where some are rounded to 4 bits."""
GELU = 2e-3
"""Likewise where vLLM computes GELU exactly, and transformers by a hyperbolic tangent."""
SETTINGS = "quantization_config"


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory, short: Calibration) -> Directories:
    return Directories(tmp_path_factory.mktemp("engines"), short)


def serve(tmp_path: Path, jobs: list[dict[str, Any]], *flags: str) -> list[dict[str, Any]]:
    request, result = tmp_path / "request.json", tmp_path / "result.json"
    request.write_text(json.dumps(jobs))
    command = [sys.executable, str(PROGRAM), str(request), str(result), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(result.read_text())
    return found


def job(directory: Path, **options: Any) -> dict[str, Any]:
    return {
        "directory": str(directory),
        "options": options,
        "prompts": prompts(),
        "tokens": TOKENS,
    }


def check(directory: Path, result: dict[str, Any], noise: float = NOISE) -> None:
    assert "error" not in result, result["error"]
    settings = json.loads((directory / "config.json").read_text())[SETTINGS]
    if "activations" in settings:
        bound = COARSE if settings["activations"]["norm"] == 4 else ROUNDED
        assert compare_rounded(directory, result, bound) <= 2
    else:
        compare_floats(directory, result, noise)


def compare_floats(directory: Path, result: dict[str, Any], noise: float) -> None:
    for (tokens, logprobs), found in zip(own_answers(directory), result["answers"], strict=True):
        assert found["tokens"] == tokens
        assert found["logprobs"] == pytest.approx(logprobs, abs=noise)


def compare_rounded(directory: Path, result: dict[str, Any], bound: float) -> int:
    """How many answers of five differ by more than noise: by ``bound`` at most, one in its words.

    A value between two codes may fall to the other side. It moves all that follow, and may decide
    between two words that are nearly as likely.
    """
    far = others = 0
    for (tokens, logprobs), found in zip(own_answers(directory), result["answers"], strict=True):
        same = [one == other for one, other in zip(tokens, found["tokens"], strict=True)]
        until = len(same) if all(same) else same.index(False) + 1
        assert found["logprobs"][:until] == pytest.approx(logprobs[:until], abs=bound)
        others += not all(same)
        far += found["logprobs"] != pytest.approx(logprobs, abs=NOISE)
    assert others <= 1
    return far


def test_registering_again_changes_nothing() -> None:
    code = (
        "from quantine.engines.vllm.plugin import register; register(); register();"
        "from vllm.model_executor.layers import quantization;"
        "assert quantization.QUANTIZATION_METHODS.count('quantine') == 1;"
        "print(quantization.get_quantization_config('quantine').__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "EngineConfig"


def test_families_with_a_scheme_for_every_matrix(directories: Directories, tmp_path: Path) -> None:
    made = [directories.quantized(family, "mixed") for family in SERVED]
    results = serve(tmp_path, [job(directory) for directory in made])
    for directory, result in zip(made, results, strict=True):
        check(directory, result)


def test_plans(directories: Directories, tmp_path: Path) -> None:
    names = ("spqr", "all", "adadim", "rptq", "clusters", "token", "floats")
    made = [directories.quantized("llama", name) for name in names]
    made += [directories.quantized("llama_tied", "all")]
    made += [directories.quantized("opt", name) for name in ("spqr", "rptq", "clusters")]
    results = serve(tmp_path, [job(directory) for directory in made])
    for directory, result in zip(made, results, strict=True):
        check(directory, result)


def test_bloom_but_for_its_queries(directories: Directories, tmp_path: Path) -> None:
    directory = directories.quantized("bloom", "bloom")
    [result] = serve(tmp_path, [job(directory)])
    check(directory, result, GELU)


def test_refusals(directories: Directories, tmp_path: Path) -> None:
    expected = {
        ("llama", "keys"): "key, value is not served",
        ("bloom", "mixed"): "rearranges",
        ("neox_parallel", "mixed"): "not served",
        ("opt", "all"): "in floats only",
    }
    made = [directories.quantized(*what) for what in expected]
    results = serve(tmp_path, [job(directory) for directory in made])
    for result, text in zip(results, expected.values(), strict=True):
        assert text in result["error"]


def test_scheduling(directories: Directories, tmp_path: Path) -> None:
    directory = directories.quantized("llama", "all")
    options: list[dict[str, Any]] = [
        {"max_num_batched_tokens": 16, "max_num_seqs": 4, "enable_chunked_prefill": True},
        {"enable_prefix_caching": True},
        {"enable_prefix_caching": False, "max_num_seqs": 1},
    ]
    for result in serve(tmp_path, [job(directory, **chosen) for chosen in options]):
        check(directory, result)


def test_compiled_graphs(directories: Directories, tmp_path: Path) -> None:
    made = [directories.quantized("llama", name) for name in ("all", "rptq")]
    results = serve(tmp_path, [job(directory, enforce_eager=False) for directory in made])
    for directory, result in zip(made, results, strict=True):
        check(directory, result)


def test_tensor_parallelism(directories: Directories, tmp_path: Path) -> None:
    two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    made = [directories.quantized(family, "split") for family in ("llama", "llama_tied")]
    jobs = [job(directory, **two) for directory in made]
    results = serve(tmp_path, jobs, "--processes")
    for directory, result in zip(made, results, strict=True):
        check(directory, result)


@pytest.mark.parametrize("sym", [False, True])
def test_compressed_tensors_of_other_bits(
    sym: bool, directories: Directories, tmp_path: Path
) -> None:
    made, jobs = [], []
    for bits in (2, 3, 6, 8):
        plan = Plan.preset("rtn", bits=bits, group_size=32, sym=sym, arithmetic="exact")
        out = tmp_path / f"{bits}"
        made.append(quantize(directories.floats("llama"), out, plan, Calibration(samples=0)).path)
        served = export(out, tmp_path / f"{bits}-ct", "compressed-tensors").path
        jobs.append(job(served))
    for directory, result in zip(made, serve(tmp_path, jobs), strict=True):
        check(directory, result)


@pytest.mark.skipif(
    platform.machine() == "x86_64" and "vnni" not in Path("/proc/cpuinfo").read_text(),
    reason="vLLM's products of int8 overflow on processors without VNNI",
)
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_int8_of_compressed_tensors(
    granularity: str, directories: Directories, short: Calibration, tmp_path: Path
) -> None:
    plan = Plan.from_dict(
        {
            "rules": [
                {"match": "@blocks", "method": "rtn", "bits": 8, "group_size": -1, "sym": True}
            ],
            "activations": {
                "norm": 8,
                "attention": 8,
                "hidden": 8,
                "granularity": granularity,
                "token_factors": False,
            },
            "arithmetic": "exact",
        }
    )
    out = quantize(directories.floats("llama"), tmp_path / "out", plan, short).path
    served = export(out, tmp_path / "ct", "compressed-tensors", engine="vllm").path
    [result] = serve(tmp_path, [job(served)])
    assert "error" not in result, result["error"]
    compare_rounded(out, result, ROUNDED)


@pytest.mark.slow
def test_the_demo_model(tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    plan = Plan.preset("rtn", bits=4, group_size=64, arithmetic="exact")
    quantize("demo", directory, plan, Calibration(samples=0))
    [result] = serve(tmp_path, [job(directory)])
    check(directory, result, DEEP)
