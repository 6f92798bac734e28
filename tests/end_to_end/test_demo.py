"""The demo model, as a user would do it: quantize, evaluate, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantine import cli
from quantine.runtime.source import locate

pytestmark = pytest.mark.slow

EVALUATION = ["--window", "256", "--limit", "8", "--quiet"]


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Numbers of the float model and of three quantized ones on held-out built-in text."""
    root = tmp_path_factory.mktemp("demo")
    requests = {
        "rtn4": ["--method", "rtn", "--bits", "4", "--samples", "0"],
        "rtn3": ["--method", "rtn", "--bits", "3", "--samples", "0"],
        "gptq3": ["--method", "gptq", "--bits", "3", "--samples", "16", "--seqlen", "256"],
    }
    found = {}
    for name, request in {"float": None, **requests}.items():
        model = "demo"
        if request is not None:
            model = str(root / name)
            assert cli.main(["quantize", "demo", model, *request, "--quiet"]) == 0
        path = root / f"{name}.json"
        reference = [] if request is None else ["--reference", "demo"]
        assert cli.main(["eval", model, *EVALUATION, *reference, "--json", str(path)]) == 0
        found[name] = json.loads(path.read_text())
    return found


def test_perplexity_rises_as_bits_fall_and_gptq_holds_it_down(
    scores: dict[str, dict[str, Any]],
) -> None:
    perplexity = {name: value["perplexity"] for name, value in scores.items()}
    assert perplexity["float"] < perplexity["rtn4"] < 1.5 * perplexity["float"]
    assert perplexity["rtn4"] < perplexity["gptq3"] < perplexity["rtn3"]
    assert perplexity["gptq3"] < 2 * perplexity["float"]
    kl = {name: scores[name]["kl"] for name in ("rtn4", "gptq3", "rtn3")}
    assert 0 < kl["rtn4"] < kl["gptq3"] < kl["rtn3"]
    top1 = {name: scores[name]["top1"] for name in kl}
    assert 1 > top1["rtn4"] > top1["gptq3"] > top1["rtn3"] > 0.3


def test_bits_are_those_of_groups_of_64(scores: dict[str, dict[str, Any]]) -> None:
    assert scores["rtn4"]["bits_per_weight"] == 4 + (16 + 4) / 64 == 4.3125
    assert scores["rtn3"]["bits_per_weight"] == 3 + (16 + 3) / 64 == 3.296875
    assert scores["gptq3"]["bits_per_weight"] == 3.296875
    assert scores["gptq3"]["model_bytes"] < scores["rtn4"]["model_bytes"]


def test_the_same_tokens_were_scored(scores: dict[str, dict[str, Any]]) -> None:
    assert {value["tokens"] for value in scores.values()} == {8 * 255}


def test_a_half_downloaded_gguf_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = locate("demo")
    assert source.gguf_file is not None
    whole = (source.directory / source.gguf_file).read_bytes()
    for share in (2000, len(whole) // 100, len(whole) // 2):
        (tmp_path / "half.gguf").write_bytes(whole[:share])
        command = ["quantize", str(tmp_path / "half.gguf"), str(tmp_path / "out"), "--samples", "0"]
        assert cli.main([*command, "--method", "rtn", "--quiet"]) == 2
        said = capsys.readouterr().err
        assert "half.gguf" in said
        assert "Traceback" not in said
